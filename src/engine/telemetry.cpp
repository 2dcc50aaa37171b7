#include "stream_cqsa/telemetry.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <ostream>
#include <utility>

namespace stream_cqsa {
namespace {

// A small number for the calling thread: trace viewers show one row for each.
int thread_number() {
  static std::atomic<int> next{0};
  thread_local const int number = next++;
  return number;
}

// The calling thread's innermost timer.
thread_local StageTimer* innermost = nullptr;

}  // namespace

std::string_view name_of(Stage stage) {
  static constexpr std::array<std::string_view, stage_count> names = {
      "read",  "copy in", "compute",  "copy out", "transfer", "merge",
      "spill", "write",   "checksum", "verify",   "sync",     "checkpoint"};
  return names[static_cast<std::size_t>(stage)];
}

Telemetry::Telemetry(std::ostream* trace) : trace_(trace), start_(now_seconds()) {
  if (trace_) *trace_ << "[";
}

Telemetry::~Telemetry() {
  if (trace_) *trace_ << "\n]\n";
}

void Telemetry::record(Stage stage, Interval interval, std::int64_t bytes, std::int64_t subproblem,
                       double elsewhere) {
  const std::scoped_lock lock(mutex_);
  StageTotals& total = totals_[static_cast<std::size_t>(stage)];
  total.busy_seconds += interval.end - interval.begin - elsewhere;
  ++total.operations;
  total.bytes += bytes;
  if (!trace_) return;
  *trace_ << fmt::format(
      "{}\n{{\"name\":\"{}\",\"ph\":\"X\",\"pid\":{},\"tid\":{},\"ts\":{:.3f},\"dur\":{:.3f},"
      "\"args\":{{\"subproblem\":{},\"bytes\":{}}}}}",
      first_event_ ? "" : ",", name_of(stage), getpid(), thread_number(),
      (interval.begin - start_) * 1e6, (interval.end - interval.begin) * 1e6, subproblem, bytes);
  first_event_ = false;
}

std::array<StageTotals, stage_count> Telemetry::totals() const {
  const std::scoped_lock lock(mutex_);
  return totals_;
}

StageTimer::StageTimer(Telemetry& telemetry, Stage stage, std::int64_t bytes,
                       std::int64_t subproblem)
    : telemetry_(telemetry),
      stage_(stage),
      bytes_(bytes),
      subproblem_(subproblem),
      outer_(std::exchange(innermost, this)) {}

StageTimer::~StageTimer() {
  const double end = now_seconds();
  innermost = outer_;
  if (outer_) outer_->inner_seconds_ += end - begin_;
  telemetry_.record(stage_, {begin_, end}, bytes_, subproblem_, inner_seconds_);
}

}  // namespace stream_cqsa
