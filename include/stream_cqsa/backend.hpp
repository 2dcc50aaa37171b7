// What the engine asks of a device. The CPU and CUDA implement it; one engine drives both.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/softmax_state.hpp"
#include "stream_cqsa/telemetry.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// Each lane is a first-in first-out queue (a CUDA stream, a CPU thread); lanes run at once.
enum class Lane { copy_in, compute, copy_out };
inline constexpr int lane_count = 3;

/// Names a piece of work submitted to a lane. Work completes in the order of the sequence.
/// Sequence 0 is complete from the start.
struct Ticket {
  Lane lane = Lane::copy_in;
  std::uint64_t sequence = 0;
};

enum class SlotTensor { query, key, value };

/// Consecutive tokens that go into a slot, all from one block of host memory.
struct SlotRows {
  std::int64_t first_token = 0;  ///< within the slot
  std::int64_t tokens = 0;
  StridedRows source;
};

/// Rows of Q into a query slot, or of K or V into a key/value slot.
/// The slot's layout is [token][head][dim] of the head group, in the storage type.
struct CopyIn {
  std::int64_t subproblem = 0;  ///< for messages and traces
  SlotTensor tensor = SlotTensor::query;
  std::int32_t slot = 0;
  std::int64_t heads = 0;        ///< query or key/value heads of the group
  std::int64_t slot_tokens = 0;  ///< tokens of the chunk in the slot
  std::vector<SlotRows> rows;    ///< in any order

  /// `vector_bytes` = dim * element size.
  std::int64_t bytes(std::int64_t vector_bytes) const {
    std::int64_t tokens = 0;
    for (const SlotRows& some : rows) tokens += some.tokens;
    return tokens * heads * vector_bytes;
  }
};

/// One key chunk of a query chunk's work.
struct KeyWork {
  std::int32_t slot = 0;
  Range keys;            ///< token range, for the mask
  bool partial = false;  ///< false: full, no mask
};

/// One query chunk's work: its key chunks, in order, into one state slot.
struct QueryWork {
  std::int32_t slot = 0;
  std::int32_t state_slot = 0;
  Range queries;               ///< token range, for the mask
  std::int64_t first_key = 0;  ///< into WorkList::keys
  std::int64_t key_count = 0;
};

/// One launch: everything that a subproblem computes.
struct WorkList {
  std::int64_t subproblem = 0;
  HeadGroup heads;
  std::vector<QueryWork> queries;
  std::vector<KeyWork> keys;
};

/// Rows of a state slot to host memory. A state slot holds the states of one query chunk,
/// row = token * query heads of the group + head.
struct CopyOut {
  std::int64_t subproblem = 0;  ///< for messages and traces
  std::int32_t state_slot = 0;
  std::int64_t slot_rows = 0;  ///< rows of the chunk in the slot
  std::int64_t first_row = 0;
  SoftmaxStates into;
};

/// into = merge(into, from), see softmax_state.hpp.
struct MergeWork {
  std::int64_t subproblem = 0;  ///< of `from_slot`; for messages and traces
  std::int32_t from_slot = 0;
  std::int32_t into_slot = 0;
  std::int64_t rows = 0;  ///< of the chunk in both state slots
};

/// The end of a query chunk's rows: O = acc / l into an output slot; m and l too, where the plan's
/// request has an lse.
struct FinaliseWork {
  std::int64_t subproblem = 0;  ///< the last merged; for messages and traces
  std::int32_t state_slot = 0;
  std::int64_t rows = 0;          ///< of the chunk in the slot
  std::int64_t keyless_rows = 0;  ///< the first ones, which see no key: O = 0
  std::int32_t output_slot = 0;
};

/// Finished rows of an output slot to host memory.
struct CopyOutRows {
  std::int64_t subproblem = 0;  ///< for messages and traces
  std::int32_t output_slot = 0;
  std::int64_t slot_rows = 0;  ///< rows of the chunk in the slot
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
  std::byte* output = nullptr;  ///< [rows][dim] in the output type
  float* m = nullptr;           ///< [rows], or null: neither m nor l is wanted
  float* l = nullptr;           ///< [rows]
};

/// A device with an arena. Submitting may be called from several threads; each lane is fed from one
/// thread at a time. Submitting does not block on other work, but for launch() where more launches
/// are in flight than the backend keeps work lists for: until the oldest of them is complete.
///
/// Errors in submitted work are thrown, as Error naming the subproblem and the call, by wait().
class Backend {
 public:
  virtual ~Backend() = default;

  /// What a plan needs to know. `problem` decides kernel tiles and workspace.
  virtual DeviceTraits traits(const Problem& problem) const = 0;

  /// Names the arithmetic that computes `problem`: devices of one text give, for one plan and one
  /// input, the same bits.
  virtual std::string numerics(const Problem& problem) const = 0;

  /// Allocates exactly plan.device.bytes() and readies the lanes for this plan. Called once, and
  /// again with another plan where it has thrown OutOfDeviceMemory, as it does when the device has
  /// less memory left than that, or, all work having ended, for the rest of a run: what it
  /// allocated before is freed first. Every piece of work is recorded in `telemetry` (copy in,
  /// compute, copy out; bytes copied). Both must outlive the backend's work.
  virtual void prepare(const Plan& plan, Telemetry& telemetry) = 0;

  /// Bytes of device memory that prepare() allocated.
  virtual std::int64_t allocated_bytes() const = 0;

  /// Bytes of the device's memory in use by anybody, after prepare(): on a GPU the driver's
  /// context, the kernels and other programs too. Where the device is the host, what prepare()
  /// allocated.
  virtual std::int64_t memory_in_use() const { return allocated_bytes(); }

  /// Readies host memory for copies at full speed (pins it) as long as the handle lives, which must
  /// not be longer than the backend and the memory. May be none, where all memory is as fast.
  virtual std::shared_ptr<void> pin(std::span<std::byte>) { return nullptr; }

  /// Submits work that starts when everything before it in its lane and every ticket in `after` is
  /// complete. Memory that the work refers to must stay valid until the ticket completes.
  virtual Ticket copy_in(const CopyIn& copy, std::span<const Ticket> after) = 0;
  virtual Ticket launch(WorkList work, std::span<const Ticket> after) = 0;
  virtual Ticket copy_out(const CopyOut& copy, std::span<const Ticket> after) = 0;

  /// For plans with accumulators on the device. Both are work of the compute lane, with the bits of
  /// stream_cqsa::merge() and finalise() for every number that is not NaN.
  virtual Ticket merge(const MergeWork& work, std::span<const Ticket> after) = 0;
  virtual Ticket finalise(const FinaliseWork& work, std::span<const Ticket> after) = 0;
  virtual Ticket copy_out_rows(const CopyOutRows& copy, std::span<const Ticket> after) = 0;

  /// Blocks until `ticket` is complete. Throws what its work, or work that it waited for, threw.
  /// Any thread may wait for any ticket, any number of times: a lane completes in order, so a
  /// completed count and the first failure of each lane are all that need be kept.
  virtual void wait(Ticket ticket) = 0;

  /// Says that the results of everything submitted, and yet to be, are not wanted: it should end
  /// soon, and wait() may throw for it. Does not block. For good, but for prepare().
  virtual void cancel() noexcept {}

  /// Blocks until everything submitted has ended, well or not: then no lane touches host memory.
  virtual void quiesce() noexcept = 0;

  /// Scores computed so far, for all plans, in whole kernel tiles, masked ones in partial tiles
  /// included: the arithmetic really done. One score costs 4 * head_dim floating-point operations.
  virtual std::uint64_t scores_computed() const = 0;

  /// NaN and infinite values in O that finalise() has written since prepare(). Called when no work
  /// is under way.
  virtual NonFinite output_non_finite() = 0;
};

struct CpuOptions {
  int threads = 0;  ///< 0: one per available core
};

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options);

}  // namespace stream_cqsa
