// The computing side of a rank: subproblems in, partials out.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "engine/assignment.hpp"
#include "engine/device_accumulators.hpp"
#include "engine/host_cache.hpp"
#include "engine/in_flight.hpp"
#include "engine/launched.hpp"
#include "engine/monitor.hpp"
#include "engine/partial.hpp"
#include "engine/slot_cache.hpp"
#include "engine/use_table.hpp"
#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/engine.hpp"

namespace stream_cqsa {

/// Nothing may be freed while a lane still copies to or from it.
struct Quiesce {
  Backend& backend;
  ~Quiesce() { backend.quiesce(); }
};

/// Runs subproblems through a backend with three threads of its own, one subproblem after another
/// in each of them, several subproblems at once in all:
///
///   schedule  takes the next subproblem, assigns device slots, requests input blocks
///   submit    waits for the blocks, submits copies and the launch
///   drain     submits the copies out behind the launch, waits for them, delivers the partials
///
/// and with the readers of the host cache. Threads are started in the given crew; a failure in any
/// of them aborts the group.
///
/// Where the arena has fewer slots than a subproblem has chunks, as on a worker of little memory,
/// it is computed in parts, each with as many of its query chunks as half of the slots hold and all
/// of their keys, one launch each: the same partials, bit for bit.
///
/// With accumulators on the device, submit also has the partials merged there, and drain copies
/// finished rows out instead: see DeviceAccumulators.
class Pipeline {
 public:
  using NextSubproblem = std::function<std::optional<Assignment>()>;

  /// `cache_memory` holds the plan's host cache blocks. Everything given must outlive the crew.
  Pipeline(const Plan& plan, const Inputs& inputs, std::byte* cache_memory, Backend& backend,
           PartialReceiver& receiver, Telemetry& telemetry, Abort& abort);

  /// Has `begins(order)` asked when something of an order (see Assignment) could be launched: where
  /// the answer is no, all of the order is left out. Before start().
  void on_begin(std::function<bool(std::int64_t)> begins) { begins_ = std::move(begins); }

  /// Starts the threads. `next` is called by one thread. Ids best ascend: others, and those left
  /// out, cost reads and copies that could have been spared. With accumulators on the device they
  /// must, with every chunk wanted. The pipeline ends when `next` gives nothing and all partials
  /// are delivered. `finished` is called at that end.
  void start(Crew& crew, NextSubproblem next, int read_threads, std::function<void()> finished);

 private:
  /// One tensor's rows of a chunk of a subproblem.
  struct ChunkRows {
    SlotTensor tensor = SlotTensor::query;
    Range heads;                ///< of the head group
    Block whole;                ///< of `heads`, or as read: perhaps of more heads
    bool resident = false;      ///< the source is: they are not read
    std::int64_t next_use = 0;  ///< of what is read, after the subproblem: a subproblem id
  };
  /// Rows of one cache block, or of a resident source, that go into a slot.
  struct Copy {
    std::int64_t subproblem = 0;
    SlotTensor tensor = SlotTensor::query;
    Range heads;  ///< of the head group
    Block block;  ///< as read: perhaps of more heads
    std::int32_t slot = 0;
    std::int64_t slot_tokens = 0;  ///< tokens of the chunk
    std::int64_t first_token = 0;  ///< of the block, within the chunk
    std::int32_t cached = -1;      ///< host cache block, or -1: the source is resident
  };
  /// A subproblem, or a part of one, whose slots are assigned. Slots are by position in
  /// work.chunks, -1 where the chunk is not needed on that side.
  struct Step {
    std::int64_t id = 0;
    std::int64_t order = 0;  ///< see Assignment
    SubproblemKey key;
    QuorumWork work;
    std::vector<bool> keys_later;  ///< by position: a later part needs them as well
    bool last = true;              ///< part of its subproblem
    std::vector<std::int32_t> query_slots, kv_slots;
  };
  /// What schedule tells submit, in order: a step's copies, then its launch. Copies are told
  /// one by one, so that a chunk larger than the whole host cache still streams through it.
  struct Order {
    Copy copy;
    std::unique_ptr<Step> launch;  ///< or none: then it is the copy
  };
  struct Permit {};
  struct StateSlot {
    std::int32_t number = 0;
    Ticket last_copy_out;
  };

  void schedule(const NextSubproblem& next);
  /// The live pairs of an assignment, in parts that the slots can take.
  std::vector<std::vector<ChunkPair>> parts_of(const Assignment& assignment,
                                               const QuorumWork& work) const;
  std::vector<std::int32_t> assign_slots(const Step& step, Side side);
  ChunkRows rows_of(const Step& step, SlotTensor tensor, std::size_t position);
  template <typename Visit>
  void for_each_block(const ChunkRows& rows, const Visit& visit) const;
  void order_copies(const Step& step, const ChunkRows& rows, std::int32_t slot);
  /// The rows are still in a slot: this use of them needs no copy.
  void pass_over(const ChunkRows& rows);

  void submit();
  /// `first`, and what goes with it.
  Ticket submit_copies(const Copy& first);
  /// The next order, where that is a copy into the same rows of a slot that can be made at once.
  std::optional<Copy> next_copy(const Copy& before);
  /// As many as the step has query chunks. With accumulators on the device these have them.
  std::vector<StateSlot> wait_for_state_slots(const Step& step);
  Launched launch(Step step, const std::vector<StateSlot>& free, Ticket last_copy);

  void drain();
  void copy_out(const Launched& launched, std::int32_t position);

  const Plan& plan_;
  const Inputs& inputs_;
  Backend& backend_;
  PartialReceiver& receiver_;
  Telemetry& telemetry_;
  std::function<bool(std::int64_t)> begins_;

  // Schedule's own.
  UseTable uses_;
  SlotCache query_slots_, kv_slots_;
  // Submit's own: the launch that last read each slot.
  std::vector<Ticket> query_last_use_, kv_last_use_;
  // Drain's own: copies out that are not delivered, and launches that are not counted.
  InFlight in_flight_;
  // Shared.
  HostCache cache_;
  Pool<Permit> steps_ahead_;  ///< for each step between its scheduling and its launch
  BoundedQueue<Order> orders_;
  BoundedQueue<Launched> launched_;
  BoundedQueue<StateSlot> state_slots_;  ///< free; the one that waits least for its copies first
  std::optional<DeviceAccumulators> accumulators_;  ///< where the plan has them on the device
};

}  // namespace stream_cqsa
