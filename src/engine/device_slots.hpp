// Where a plan's slots lie in the device arena.
#pragma once

#include <cstddef>
#include <cstdint>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// The slots of an arena that begins at `memory`, which need not be the host's: nothing is read.
struct DeviceSlots {
  DeviceArena arena;
  std::byte* memory = nullptr;
  std::int64_t dim = 0;

  std::byte* query(std::int64_t slot) const {
    return memory + arena.query_offset() + slot * arena.query_slot_bytes;
  }
  std::byte* key(std::int64_t slot) const {
    return memory + arena.kv_offset() + slot * arena.kv_slot_bytes;
  }
  std::byte* value(std::int64_t slot) const { return key(slot) + arena.kv_slot_bytes / 2; }
  std::byte* input(SlotTensor tensor, std::int64_t slot) const {
    if (tensor == SlotTensor::query) return query(slot);
    return tensor == SlotTensor::key ? key(slot) : value(slot);
  }
  /// A state slot that holds `rows` rows.
  SoftmaxStates states(std::int64_t slot, std::int64_t rows) const {
    return softmax_states_at(memory + arena.state_offset() + slot * arena.state_slot_bytes, rows,
                             dim);
  }
  std::byte* output(std::int64_t slot) const {
    return memory + arena.output_offset() + slot * arena.output_slot_bytes;
  }
  std::byte* workspace() const { return memory + arena.workspace_offset(); }
};

/// Some of the rows.
inline SoftmaxStates rows_of(const SoftmaxStates& states, Range rows) {
  return {states.acc + rows.begin * states.dim, states.m + rows.begin, states.l + rows.begin,
          rows.size(), states.dim};
}

}  // namespace stream_cqsa
