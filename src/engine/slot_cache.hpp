// Which device slot holds which chunk.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "engine/use_table.hpp"

namespace stream_cqsa {

/// A chunk of Q, or of K and V, for one head group.
struct ChunkKey {
  std::int64_t batch = 0;
  std::int64_t group = 0;
  std::int64_t chunk = 0;
  friend auto operator<=>(const ChunkKey&, const ChunkKey&) = default;
};

/// Assigns slots to the chunks of one subproblem after another. A chunk that is still in a slot
/// stays there. A slot is taken from the chunk whose next use is farthest (Belady 1966), but not
/// from a chunk of the subproblem just before while others are left: that one is still computing,
/// and the copy would have to wait for it. Pure bookkeeping: the same calls give the same slots.
class SlotCache {
 public:
  explicit SlotCache(std::int64_t slots) : slots_(static_cast<std::size_t>(slots)) {}

  struct Need {
    ChunkKey key;
    std::int64_t next_use = never;  ///< subproblem id
  };
  struct Assignment {
    std::int32_t slot = 0;
    bool load = false;  ///< the chunk was not there
  };

  /// The slots of `needs` (distinct chunks) for `subproblem`, the next one, in order. A chunk whose
  /// next use has passed without it, as subproblems were left out, counts as not used again.
  /// Throws std::logic_error when there are more needs than slots.
  std::vector<Assignment> assign(std::span<const Need> needs, std::int64_t subproblem);

 private:
  struct Slot {
    ChunkKey key;
    std::int64_t next_use = never;
  };
  /// By next use, then minus the slot's number: the last one is the first to go.
  using Ranking = std::set<std::pair<std::int64_t, std::int32_t>>;

  Ranking::value_type rank_of(std::int32_t slot) const {
    return {slots_[static_cast<std::size_t>(slot)].next_use, -slot};
  }
  void pass(Ranking& ranking, std::int64_t subproblem);
  std::int32_t take_slot();

  std::vector<Slot> slots_;
  std::int32_t used_ = 0;  ///< slots that have ever held a chunk: those with lower numbers
  std::map<ChunkKey, std::int32_t> where_;
  Ranking previous_;  ///< slots that the subproblem just before used
  Ranking idle_;      ///< the others that hold a chunk
};

}  // namespace stream_cqsa
