#include "engine/slot_cache.hpp"

#include <iterator>
#include <stdexcept>

namespace stream_cqsa {

std::vector<SlotCache::Assignment> SlotCache::assign(std::span<const Need> needs,
                                                     std::int64_t subproblem) {
  if (needs.size() > slots_.size())
    throw std::logic_error("a subproblem needs more slots than planned");
  std::vector<Assignment> assignments(needs.size(), {-1, true});
  Ranking current;
  const auto place = [&](std::size_t need, std::int32_t at) {
    slots_[static_cast<std::size_t>(at)] = {needs[need].key, needs[need].next_use};
    current.insert(rank_of(at));
    assignments[need].slot = at;
  };
  for (std::size_t i = 0; i < needs.size(); ++i) {
    const auto found = where_.find(needs[i].key);
    if (found == where_.end()) continue;
    previous_.erase(rank_of(found->second));
    idle_.erase(rank_of(found->second));
    place(i, found->second);
    assignments[i].load = false;
  }
  pass(previous_, subproblem);
  pass(idle_, subproblem);
  for (std::size_t i = 0; i < needs.size(); ++i) {
    if (!assignments[i].load) continue;
    const std::int32_t taken = take_slot();
    place(i, taken);
    where_[needs[i].key] = taken;
  }
  idle_.merge(previous_);
  previous_ = std::move(current);
  return assignments;
}

void SlotCache::pass(Ranking& ranking, std::int64_t subproblem) {
  while (!ranking.empty() && ranking.begin()->first < subproblem) {
    const std::int32_t slot = -ranking.begin()->second;
    ranking.erase(ranking.begin());
    slots_[static_cast<std::size_t>(slot)].next_use = never;
    ranking.insert(rank_of(slot));
  }
}

// Best first: empty, idle in the subproblem before, farthest next use, lowest number.
std::int32_t SlotCache::take_slot() {
  if (used_ < static_cast<std::int32_t>(slots_.size())) return used_++;
  Ranking& from = idle_.empty() ? previous_ : idle_;
  const auto last = std::prev(from.end());
  const std::int32_t slot = -last->second;
  from.erase(last);
  where_.erase(slots_[static_cast<std::size_t>(slot)].key);
  return slot;
}

}  // namespace stream_cqsa
