// Accumulators that stay on the device.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "engine/in_flight.hpp"
#include "engine/launched.hpp"
#include "engine/monitor.hpp"
#include "engine/partial.hpp"
#include "engine/slot_cache.hpp"
#include "engine/use_table.hpp"
#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

/// Merges partials where they lie. The state slot of a query chunk's first partial becomes the
/// chunk's accumulator; later partials are merged into it and their slots are free again; with the
/// last one the rows are finished into an output slot, copied out in pieces, and delivered.
///
/// All of that but the copies is work of the compute lane, submitted behind the launch that it
/// follows. A lane works in order, so a state slot may be given to the next launch as soon as its
/// merge is submitted, and the partials of a chunk are merged in ascending order of subproblem if
/// the launches are submitted in that order.
///
/// Two threads use it: one submits (take_slot, add, close), the other drains.
class DeviceAccumulators {
 public:
  DeviceAccumulators(const Plan& plan, Backend& backend, PartialReceiver& receiver,
                     Telemetry& telemetry, Abort& abort);

  /// A state slot for a query chunk of the next launch. The plan has enough: it never waits.
  std::int32_t take_slot();

  /// Submits what follows a launch. Launches come in ascending order of subproblem. Waits while too
  /// many of them are under way, and for output slots.
  void add(const Launched& launched);

  /// Says that no more launches will come.
  void close() { items_.close(); }

  /// Copies out and delivers finished rows, and counts launches as they end, until closed.
  void drain();

 private:
  /// A query chunk some of whose partials are merged.
  struct Open {
    std::int32_t slot = -1;
    std::size_t merged = 0;                  ///< of the chunk's quorums
    std::vector<std::int64_t> piece_scores;  ///< of one head, merged so far
  };
  struct OutputSlot {
    std::int32_t number = 0;
    Ticket last_copy_out;
  };
  /// What drain does next: a launch to be counted, or a finished chunk to be copied out.
  struct Item {
    std::int64_t subproblem = 0;
    Ticket ticket;
    std::uint64_t scores = 0;       ///< of a launch, over all heads
    std::int32_t output_slot = -1;  ///< of a finished chunk
    ChunkKey chunk;
    std::vector<std::int64_t> piece_scores;
  };

  void merge(const Launched& launched, std::int32_t position);
  void finalise(std::int64_t subproblem, const ChunkKey& key, Open open);
  std::uint64_t scores_of_launch(const Launched& launched) const;
  std::int64_t rows_of(const ChunkKey& key) const;
  std::int64_t heads_of(std::int64_t group) const;

  void copy_out(const Item& item);

  const Plan& plan_;
  Backend& backend_;
  PartialReceiver& receiver_;
  Telemetry& telemetry_;

  // The submitting thread's own.
  UseTable uses_;
  std::vector<std::int32_t> free_slots_;
  std::map<ChunkKey, Open> open_;
  std::deque<Ticket> under_way_;  ///< launches
  // Drain's own: copies out that are not delivered, and launches that are not counted.
  InFlight in_flight_;
  // Shared.
  BoundedQueue<OutputSlot> output_slots_;  ///< free; the one that waits least for its copies first
  BoundedQueue<Item> items_;
};

}  // namespace stream_cqsa
