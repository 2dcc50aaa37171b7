#include "engine/open_pieces.hpp"

namespace stream_cqsa {

OpenPieces::OpenPieces(const Plan& plan, bool unlimited)
    : unlimited_(unlimited),
      groups_outer_(plan.order == ScheduleOrder::groups_outer),
      groups_(static_cast<std::int64_t>(plan.groups.size())),
      accumulators_(plan.host.accumulators) {
  std::int64_t pieces = 0;
  for (std::int64_t chunk = plan.merged_chunks.begin; chunk < plan.merged_chunks.end; ++chunk)
    pieces += piece_count(plan, plan.division.chunk(chunk).queries);
  const std::int64_t batch = plan.problem().batch;
  unfinished_.assign(static_cast<std::size_t>(groups_outer_ ? batch * groups_ : batch),
                     groups_outer_ ? pieces : pieces * groups_);
}

bool OpenPieces::may_begin(const PieceKey& key) const {
  const std::int64_t sweep = sweep_of(key);
  if (unlimited_ || sweep == first_unfinished_) return true;
  std::int64_t needed = 1;
  for (std::int64_t before = first_unfinished_; before < sweep; ++before)
    needed += unfinished_[static_cast<std::size_t>(before)];
  for (auto begun = begun_.lower_bound(sweep); begun != begun_.end(); ++begun)
    needed += begun->second;
  return needed <= accumulators_;
}

void OpenPieces::end(const PieceKey& key, bool begun) {
  const std::int64_t sweep = sweep_of(key);
  --unfinished_[static_cast<std::size_t>(sweep)];
  if (begun && --begun_[sweep] == 0) begun_.erase(sweep);
  const auto sweeps = static_cast<std::int64_t>(unfinished_.size());
  while (first_unfinished_ < sweeps &&
         unfinished_[static_cast<std::size_t>(first_unfinished_)] == 0) {
    ++first_unfinished_;
  }
}

}  // namespace stream_cqsa
