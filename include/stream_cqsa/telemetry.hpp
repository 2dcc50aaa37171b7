// What a run did and when: busy time and bytes by stage, progress, and a trace.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <iosfwd>
#include <mutex>
#include <string_view>

namespace stream_cqsa {

enum class Stage {
  read,        ///< files to host cache
  copy_in,     ///< host to device slots
  compute,     ///< kernels
  copy_out,    ///< state slots to host
  transfer,    ///< partials from other ranks, while any is on its way
  merge,       ///< partials into accumulators, and finishing rows
  spill,       ///< accumulators to and from the scratch file
  write,       ///< finished rows to the output
  checksum,    ///< fingerprints of what is read and written
  verify,      ///< sampled rows against fp64, after the last write
  sync,        ///< outputs to storage and to their names
  checkpoint,  ///< finished rows, states and journal to storage, and reading them when continued
};
inline constexpr int stage_count = 12;
std::string_view name_of(Stage stage);

/// Seconds of std::chrono::steady_clock.
inline double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// When a piece of work ran.
struct Interval {
  double begin = 0;
  double end = 0;
};

struct StageTotals {
  double busy_seconds = 0;  ///< summed over the threads of the stage, see StageTimer
  std::int64_t operations = 0;
  std::int64_t bytes = 0;
};

/// Collects from all threads of a run. Every member function is thread-safe.
class Telemetry {
 public:
  /// With `trace`, every recorded interval is also written there in Chrome's trace-event format.
  /// The stream must outlive this object, whose destructor closes the JSON array.
  explicit Telemetry(std::ostream* trace = nullptr);
  ~Telemetry();
  Telemetry(const Telemetry&) = delete;
  Telemetry& operator=(const Telemetry&) = delete;

  /// Records that the calling thread (or its device) spent `interval` on `stage` for `subproblem`
  /// (negative: none in particular) and moved `bytes`. `elsewhere` seconds of the interval belong
  /// to other stages.
  void record(Stage stage, Interval interval, std::int64_t bytes, std::int64_t subproblem,
              double elsewhere = 0);

  std::array<StageTotals, stage_count> totals() const;

  /// Live scores of subproblems whose kernel has finished, over all heads.
  void add_scores(std::uint64_t scores) { scores_done_ += scores; }
  std::uint64_t scores_done() const { return scores_done_; }
  /// Those that an earlier run merged; they are counted as done too.
  void add_restored_scores(std::uint64_t scores) {
    restored_scores_ += scores;
    scores_done_ += scores;
  }
  std::uint64_t restored_scores() const { return restored_scores_; }
  void add_subproblem() { ++subproblems_done_; }
  std::int64_t subproblems_done() const { return subproblems_done_; }

 private:
  mutable std::mutex mutex_;
  std::array<StageTotals, stage_count> totals_{};
  std::ostream* trace_;
  bool first_event_ = true;
  double start_;
  std::atomic<std::uint64_t> scores_done_{0};
  std::atomic<std::uint64_t> restored_scores_{0};
  std::atomic<std::int64_t> subproblems_done_{0};
};

/// Records the time from its construction to its destruction, both by one thread. The time of a
/// timer inside another's life on the same thread counts for the inner stage alone: a checksum made
/// within a read is no reading. The trace shows both intervals whole.
class StageTimer {
 public:
  StageTimer(Telemetry& telemetry, Stage stage, std::int64_t bytes, std::int64_t subproblem);
  ~StageTimer();
  StageTimer(const StageTimer&) = delete;
  StageTimer& operator=(const StageTimer&) = delete;

 private:
  Telemetry& telemetry_;
  Stage stage_;
  std::int64_t bytes_;
  std::int64_t subproblem_;
  StageTimer* outer_;         ///< the thread's timer around this one, or null
  double inner_seconds_ = 0;  ///< of timers inside this one
  double begin_ = now_seconds();
};

}  // namespace stream_cqsa
