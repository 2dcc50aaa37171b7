#include "engine/slot_cache.hpp"

#include <stdexcept>
#include <tuple>

namespace stream_cqsa {

std::vector<SlotCache::Assignment> SlotCache::assign(std::span<const Need> needs) {
  if (needs.size() > slots_.size())
    throw std::logic_error("a subproblem needs more slots than planned");
  std::vector<Assignment> assignments(needs.size(), {-1, true});
  const auto place = [&](std::size_t need, std::int32_t at) {
    Slot& slot = slots_[static_cast<std::size_t>(at)];
    slot = {true, needs[need].key, needs[need].next_use, step_};
    assignments[need].slot = at;
  };
  for (std::size_t i = 0; i < needs.size(); ++i) {
    if (const auto found = where_.find(needs[i].key); found != where_.end()) {
      place(i, found->second);
      assignments[i].load = false;
    }
  }
  for (std::size_t i = 0; i < needs.size(); ++i) {
    if (!assignments[i].load) continue;
    const std::size_t taken = victim();
    if (slots_[taken].used) where_.erase(slots_[taken].key);
    place(i, static_cast<std::int32_t>(taken));
    where_[needs[i].key] = static_cast<std::int32_t>(taken);
  }
  ++step_;
  return assignments;
}

std::size_t SlotCache::victim() const {
  // Best first: empty, idle in the subproblem before, farthest next use, lowest number.
  const auto rank = [&](const Slot& slot) {
    return std::tuple(!slot.used, slot.last_step < step_ - 1, slot.next_use);
  };
  std::size_t best = slots_.size();
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].last_step == step_) continue;  // needed by this very subproblem
    if (best == slots_.size() || rank(slots_[i]) > rank(slots_[best])) best = i;
  }
  return best;
}

}  // namespace stream_cqsa
