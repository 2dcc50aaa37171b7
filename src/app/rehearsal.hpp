// Which subproblems of a plan are tried, which of their rows are checked, and against what.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "app/problem.hpp"
#include "app/verification.hpp"
#include "engine/sampled_partials.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// `count` different subproblems with a live pair, ascending: the first, the last and evenly
/// between, the next live one where that has none. Fewer where the plan has fewer.
std::vector<std::int64_t> spread_subproblems(const Plan& plan, std::int64_t count);

/// Those of --only, "ID,ID,...", ascending, each once. Throws InputError where one is no subproblem
/// of the plan or has no live pair.
std::vector<std::int64_t> subproblems_option(const Plan& plan, const std::string& text);

/// `count` different tokens of a subproblem's live query chunks: the first row of the first chunk,
/// the last of the last one, then random ones, the same for the same seed. Fewer where there are
/// fewer.
std::vector<std::int64_t> sample_tokens(const QuorumWork& work, std::int64_t count,
                                        std::uint64_t seed);

/// Compares the softmax states of a subproblem's sampled tokens, a row for each head, with fp64
/// restricted to the keys of that row's pairs: acc / l, and m + log2(l) as an lse, by the bounds of
/// verify_rows() for an output of fp32. `seen`: see reference_rows().
Verification verify_subproblem(OpenProblem& open, const Plan& plan, std::int64_t id,
                               const std::vector<SampledToken>& tokens,
                               const KeysSeen& seen = nullptr);

}  // namespace stream_cqsa
