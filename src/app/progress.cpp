#include "app/progress.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <utility>

#include "app/text.hpp"
#include "core/counted.hpp"

namespace stream_cqsa {

namespace {

// Of a run of so many live scores, over all heads.
Progressed run_progress(const Telemetry& telemetry, const Backend* backend, const Plan& plan,
                        std::uint64_t total_scores, double elapsed) {
  // The backend counts while a kernel runs, masked scores of partial tiles included.
  const std::uint64_t restored = telemetry.restored_scores();
  const std::uint64_t scores = std::min(
      std::max(telemetry.scores_done(), restored + (backend ? backend->scores_computed() : 0)),
      total_scores);
  const double flops =
      static_cast<double>(scores - restored) * 4.0 * static_cast<double>(plan.problem().head_dim);
  const auto share = [&](std::uint64_t part) {
    return total_scores > 0 ? static_cast<double>(part) / static_cast<double>(total_scores) : 1.0;
  };
  return {share(scores), share(restored),
          fmt::format("{} of {}  {}", telemetry.subproblems_done(),
                      counted(plan.subproblem_count(), "subproblem"),
                      format_flops(flops / std::max(elapsed, 1e-9)))};
}

}  // namespace

Progress::Progress(Measure measure)
    : measure_(std::move(measure)), terminal_(isatty(STDERR_FILENO) != 0), thread_([this] {
        const std::chrono::milliseconds period(terminal_ ? 200 : 30000);
        std::unique_lock lock(mutex_);
        while (!ended_.wait_for(lock, period, [this] { return end_; })) show(false);
      }) {}

Progress::Progress(const Telemetry& telemetry, const Backend* backend, const Plan& plan,
                   std::uint64_t total_scores)
    : Progress([&telemetry, backend, &plan, total_scores](double elapsed) {
        return run_progress(telemetry, backend, plan, total_scores, elapsed);
      }) {}

Progress::~Progress() {
  {
    const std::scoped_lock lock(mutex_);
    end_ = true;
  }
  ended_.notify_all();
  thread_.join();
  if (terminal_) show(true);
}

void Progress::show(bool last) const {
  const double elapsed = now_seconds() - begin_;
  const auto [done, before, text] = measure_(elapsed);
  const std::string left = done > before
                               ? format_duration(elapsed / (done - before) * (1 - done)) + " left"
                               : "time left unknown";
  const std::string line = fmt::format("{:5.1f}%  {}  {}", done * 100, text,
                                       last ? format_duration(elapsed) + " elapsed" : left);
  if (terminal_) {
    constexpr int width = 24;
    const int filled = std::clamp(static_cast<int>(done * width), 0, width);
    fmt::print(stderr, "\r[{:<{}}] {}\x1b[K{}", std::string(static_cast<std::size_t>(filled), '#'),
               width, line, last ? "\n" : "");
  } else {
    fmt::print(stderr, "{}\n", line);
  }
  std::fflush(stderr);
}

}  // namespace stream_cqsa
