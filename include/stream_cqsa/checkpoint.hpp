// What makes a run durable, and how it is asked to stop.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>

#include "stream_cqsa/error.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

/// What a run is asked for from outside, by signal handlers among others: each member is lock-free.
struct StopRequest {
  std::atomic<std::int64_t> checkpoints{0};  ///< how often a checkpoint was asked for
  std::atomic<bool> stop{false};
  /// now_seconds() at which to stop.
  std::atomic<double> deadline{std::numeric_limits<double>::infinity()};
  /// Somebody looks here often, and will stop after a checkpoint.
  std::atomic<bool> watched{false};

  bool stop_now() const { return stop || now_seconds() >= deadline; }
};
static_assert(std::atomic<bool>::is_always_lock_free);
static_assert(std::atomic<std::int64_t>::is_always_lock_free);

/// What a run found when it was continued.
struct Resumed {
  std::uint64_t scores = 0;  ///< merged by earlier runs, over all batch entries and query heads
  std::int64_t pieces = 0;   ///< of which something was found
  // Damage.
  std::int64_t dropped_records = 0, dropped_bytes = 0;  ///< of the journal
  bool damaged_header = false;                          ///< of the journal
  std::int64_t recomputed = 0;  ///< pieces whose newest version was not sound

  bool is_damaged() const { return dropped_bytes > 0 || damaged_header || recomputed > 0; }

  /// What several ranks found.
  Resumed& operator+=(const Resumed& other) {
    scores += other.scores;
    pieces += other.pieces;
    dropped_records += other.dropped_records;
    dropped_bytes += other.dropped_bytes;
    damaged_header = damaged_header || other.damaged_header;
    recomputed += other.recomputed;
    return *this;
  }
};

struct CheckpointOptions {
  std::filesystem::path directory;  ///< that exists; empty: no checkpoint
  std::uint64_t identity = 0;       ///< of plan, inputs and version: the run that may be continued
  /// This process has written or compared all that is there, and has counted it: set by run() where
  /// it goes on by another plan.
  bool same_run = false;
  double interval = 60;         ///< seconds from one checkpoint to the next
  StopRequest* stop = nullptr;  ///< or none
  /// Called once, before the work, where an earlier run has left something, sound or not.
  std::function<void(const Resumed&)> resumed;
};

/// What checkpoints cost.
struct CheckpointTotals {
  std::int64_t written = 0;  ///< checkpoints with anything new in them
  std::int64_t records = 0;
  std::int64_t bytes = 0;  ///< of states and journal
  double seconds = 0;      ///< while which one was written, beside the work
  Resumed resumed;

  /// What those of several ranks cost.
  CheckpointTotals& operator+=(const CheckpointTotals& other) {
    written += other.written;
    records += other.records;
    bytes += other.bytes;
    seconds += other.seconds;
    resumed += other.resumed;
    return *this;
  }
};

/// Thrown by a run that was asked to stop: what it had merged is durable.
class Stopped : public Error {
 public:
  explicit Stopped(double merged) : Error("stopped after a checkpoint"), merged_(merged) {}
  double merged() const { return merged_; }  ///< share of all scores

 private:
  double merged_;
};

}  // namespace stream_cqsa
