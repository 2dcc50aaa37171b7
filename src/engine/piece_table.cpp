#include "engine/piece_table.hpp"

#include <algorithm>
#include <stdexcept>

namespace stream_cqsa {

PieceTable::PieceTable(const Plan& plan, const Range& chunks)
    : batches_(plan.problem().batch),
      groups_(static_cast<std::int64_t>(plan.groups.size())),
      chunks_(chunks),
      first_{0} {
  for (std::int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    first_.push_back(first_.back() + piece_count(plan, plan.division.chunk(chunk).queries));
  }
}

bool PieceTable::has(const PieceKey& key) const {
  const auto in = [](std::int64_t index, std::int64_t count) {
    return index >= 0 && index < count;
  };
  if (!in(key.batch, batches_) || !in(key.group, groups_) || !chunks_.contains(key.chunk)) {
    return false;
  }
  const auto chunk = static_cast<std::size_t>(key.chunk - chunks_.begin);
  return in(key.piece, first_[chunk + 1] - first_[chunk]);
}

std::int64_t PieceTable::number(const PieceKey& key) const {
  if (!chunks_.contains(key.chunk)) throw std::logic_error("a piece that another rank merges");
  return (key.batch * groups_ + key.group) * first_.back() +
         first_[static_cast<std::size_t>(key.chunk - chunks_.begin)] + key.piece;
}

PieceKey PieceTable::key(std::int64_t number) const {
  const std::int64_t group = number / first_.back();
  const std::int64_t within = number % first_.back();
  const auto next = std::upper_bound(first_.begin(), first_.end(), within);
  const std::int64_t chunk = chunks_.begin + (next - first_.begin()) - 1;
  return {group / groups_, group % groups_, chunk, within - *std::prev(next)};
}

}  // namespace stream_cqsa
