#include "app/rehearsal.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numbers>
#include <random>
#include <set>

#include "core/counted.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr std::int64_t reference_buffer_bytes = std::int64_t{16} << 20;

bool is_live(const Plan& plan, std::int64_t id) { return !plan.work(id).pairs.empty(); }

// Query chunks with a live pair, ascending.
std::vector<Range> live_queries(const QuorumWork& work) {
  std::vector<Range> queries;
  std::int32_t last = -1;
  for (const ChunkPair& pair : work.pairs) {
    if (pair.query == last) continue;
    last = pair.query;
    queries.push_back(work.chunks[static_cast<std::size_t>(pair.query)].queries);
  }
  return queries;
}

// The key chunks that a query token is paired with.
std::vector<Range> keys_of(const QuorumWork& work, std::int64_t token) {
  std::vector<Range> keys;
  for (const ChunkPair& pair : work.pairs) {
    if (work.chunks[static_cast<std::size_t>(pair.query)].queries.contains(token))
      keys.push_back(work.chunks[static_cast<std::size_t>(pair.key)].keys);
  }
  return keys;
}

bool sees_any(const Problem& problem, const RowKeys& row) {
  const std::int64_t visible = problem.visible_keys(row.row.token);
  return std::any_of(row.keys.begin(), row.keys.end(),
                     [visible](const Range& keys) { return keys.begin < visible; });
}

// A row's state as an output and an lse. One that has seen no key must be empty: its sums are what
// they are, not divided.
VerifiedRow compare(const Problem& problem, const RowKeys& row, const ReferenceRow& reference,
                    const SampledToken& token, std::size_t head) {
  const auto dim = static_cast<std::size_t>(problem.head_dim);
  const double m = token.m[head], l = token.l[head];
  const double by = sees_any(problem, row) ? l : 1.0;
  std::vector<double> output;
  for (std::size_t i = 0; i < dim; ++i) output.push_back(token.acc[head * dim + i] / by);
  return {row.row, check_row(problem, reference, output),
          check_lse(problem, reference, std::numbers::ln2 * (m + std::log2(l)))};
}

}  // namespace

std::vector<std::int64_t> spread_subproblems(const Plan& plan, std::int64_t count) {
  const std::int64_t all = plan.subproblem_count();
  const std::int64_t steps = std::max<std::int64_t>(1, std::min(count, all) - 1);
  std::set<std::int64_t> ids;
  const auto take = [&](std::int64_t id) {
    return !ids.contains(id) && is_live(plan, id) && ids.insert(id).second;
  };
  for (std::int64_t step = 0; step < std::min(count, all); ++step) {
    const std::int64_t wanted = step * ((all - 1) / steps) + step * ((all - 1) % steps) / steps;
    std::int64_t id = wanted;
    while (id < all && !take(id)) ++id;
    if (id < all) continue;
    id = wanted - 1;
    while (id >= 0 && !take(id)) --id;
  }
  return {ids.begin(), ids.end()};
}

std::vector<std::int64_t> subproblems_option(const Plan& plan, const std::string& text) {
  const std::int64_t all = plan.subproblem_count();
  std::set<std::int64_t> ids;
  const char* at = text.data();
  const char* const end = at + text.size();
  for (bool more = true; more;) {
    std::int64_t id = 0;
    const auto [next, failed] = std::from_chars(at, end, id);
    more = next < end && *next == ',';
    if (failed != std::errc() || (next < end && !more) || id < 0 || id >= all) {
      throw InputError(fmt::format(
          "--only '{}': not subproblems of the plan, which has {}; write ID,ID,... from 0 to {}",
          text, all, all - 1));
    }
    if (!is_live(plan, id)) {
      throw InputError(fmt::format(
          "--only '{}': the mask leaves subproblem {} nothing to compute; name another", text, id));
    }
    ids.insert(id);
    at = next + 1;
  }
  return {ids.begin(), ids.end()};
}

std::vector<std::int64_t> sample_tokens(const QuorumWork& work, std::int64_t count,
                                        std::uint64_t seed) {
  const std::vector<Range> queries = live_queries(work);
  std::int64_t all = 0;
  for (const Range& chunk : queries) all += chunk.size();
  count = std::min(count, all);
  std::vector<std::int64_t> tokens;
  std::set<std::int64_t> taken;
  const auto take = [&](std::int64_t token) {
    if (taken.insert(token).second) tokens.push_back(token);
  };
  if (count > 0) take(queries.front().begin);
  if (count > 1) take(queries.back().end - 1);
  std::mt19937_64 random(seed);
  while (static_cast<std::int64_t>(tokens.size()) < count) {
    auto place = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(all));
    auto chunk = queries.begin();
    while (place >= chunk->size()) place -= (chunk++)->size();
    take(chunk->begin + place);
  }
  return tokens;
}

Verification verify_subproblem(OpenProblem& open, const Plan& plan, std::int64_t id,
                               const std::vector<SampledToken>& tokens, const KeysSeen& seen) {
  const SubproblemKey key = plan.key(id);
  const QuorumWork work = plan.work(id);
  const Range heads = plan.groups[static_cast<std::size_t>(key.group)].query_heads(plan.problem());
  std::vector<RowKeys> rows;
  for (const SampledToken& token : tokens) {
    const std::vector<Range> keys = keys_of(work, token.token);
    for (std::int64_t head = heads.begin; head < heads.end; ++head)
      rows.push_back({{key.batch, token.token, head}, keys});
  }
  Problem problem = plan.problem();
  problem.output_dtype = DType::f32;  // of the states
  const auto references =
      reference_rows(problem, *open.query, *open.key, *open.value, std::span<const RowKeys>(rows),
                     reference_buffer_bytes, seen, 0);
  Verification verification;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto head_count = static_cast<std::size_t>(heads.size());
    verification.rows.push_back(
        compare(problem, rows[i], references[i], tokens[i / head_count], i % head_count));
  }
  return verification;
}

}  // namespace stream_cqsa
