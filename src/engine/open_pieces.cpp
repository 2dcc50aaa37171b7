#include "engine/open_pieces.hpp"

#include <algorithm>

namespace stream_cqsa {

OpenPieces::OpenPieces(const Plan& plan, bool unlimited)
    : unlimited_(unlimited),
      groups_outer_(plan.order == ScheduleOrder::groups_outer),
      by_chunk_(plan.division.scheme() == Scheme::tiles),
      groups_(static_cast<std::int64_t>(plan.groups.size())),
      chunks_(plan.merged_chunks),
      accumulators_(plan.host.accumulators) {
  const std::int64_t sweeps = plan.problem().batch * (groups_outer_ ? groups_ : 1);
  const std::int64_t groups = groups_outer_ ? 1 : groups_;  // of a sweep
  unfinished_.assign(static_cast<std::size_t>(sweeps * (by_chunk_ ? chunks_.size() : 1)), 0);
  for (std::int64_t chunk = chunks_.begin; chunk < chunks_.end; ++chunk) {
    const Range queries = plan.division.chunk(chunk).queries;
    if (!plan.problem().sees_keys(queries)) continue;
    const std::int64_t pieces = piece_count(plan, queries);
    for (std::int64_t sweep = 0; sweep < sweeps; ++sweep)
      unfinished_[number_of(sweep, chunk)] +=
          pieces * std::clamp<std::int64_t>((sweep + 1) * groups - plan.groups_done, 0, groups);
  }
  pass_finished();
}

bool OpenPieces::may_begin(const PieceKey& key) const {
  const std::size_t sweep = sweep_of(key);
  if (unlimited_ || sweep == first_unfinished_) return true;
  std::int64_t needed = 1;
  for (std::size_t before = first_unfinished_; before < sweep && needed <= accumulators_; ++before)
    needed += unfinished_[before];
  for (auto begun = begun_.lower_bound(sweep); begun != begun_.end(); ++begun)
    needed += begun->second;
  return needed <= accumulators_;
}

void OpenPieces::end(const PieceKey& key, bool begun) {
  const std::size_t sweep = sweep_of(key);
  --unfinished_[sweep];
  if (begun && --begun_[sweep] == 0) begun_.erase(sweep);
  pass_finished();
}

void OpenPieces::pass_finished() {
  while (first_unfinished_ < unfinished_.size() && unfinished_[first_unfinished_] == 0)
    ++first_unfinished_;
}

}  // namespace stream_cqsa
