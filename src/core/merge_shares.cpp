#include "core/merge_shares.hpp"

#include <algorithm>

namespace stream_cqsa {

MergeShares::MergeShares(const Plan& plan, int mergers) : begins_{0} {
  const std::int64_t chunks = plan.division.chunk_count();
  const std::int64_t ranks = mergers + 1;
  if (ranks > 1) {
    std::vector<double> before = {0};  // rows to merge, and one more each to write, before a chunk
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const auto partials = static_cast<double>(plan.division.quorums_of_query(chunk).size());
      const auto rows = static_cast<double>(plan.division.chunk(chunk).queries.size());
      before.push_back(before.back() + (partials + 1) * rows);
    }
    for (std::int64_t rank = 1; rank < ranks; ++rank) {
      const double target = before.back() * static_cast<double>(rank) / static_cast<double>(ranks);
      begins_.push_back(std::lower_bound(before.begin(), before.end(), target) - before.begin());
    }
  }
  begins_.push_back(chunks);
}

int MergeShares::rank_of(std::int64_t chunk) const {
  return static_cast<int>(std::upper_bound(begins_.begin(), begins_.end(), chunk) -
                          begins_.begin()) -
         1;
}

}  // namespace stream_cqsa
