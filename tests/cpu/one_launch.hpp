// A whole problem through the CPU backend: every chunk resident, one launch per batch and group.
#pragma once

#include <cstdint>
#include <vector>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/plan.hpp"
#include "support/attention.hpp"

namespace stream_cqsa::testing {

struct Cut {
  std::int64_t chunks = 1;
  std::int64_t tile = 128;
  std::int64_t heads_per_group = 1;
  int threads = 2;
};

struct Computed {
  std::vector<double> output;  ///< [batch][token][head][dim]
  std::vector<double> lse;     ///< [batch][head][token]
  std::vector<float> states;   ///< of all launches, to compare bits
  std::uint64_t scores = 0;    ///< Backend::scores_computed()
};

/// A plan by hand whose slots hold all chunks of a head group.
Plan resident_plan(const Problem& problem, const Cut& cut, const DeviceTraits& device);

/// All live work of one head group, chunk p in slots p.
WorkList resident_work(const Plan& plan, HeadGroup group);

Computed compute(const Problem& problem, const TestInput& input, const Cut& cut);

/// Compares every row with the definition in fp64, by check_row(); returns the worst ratio of
/// error to allowed error, infinity when a row does not agree.
double worst_ratio(const Problem& problem, const TestInput& input,
                   const std::vector<double>& output);

}  // namespace stream_cqsa::testing
