#include "app/progress.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>

#include "app/text.hpp"

namespace stream_cqsa {

Progress::Progress(const Telemetry& telemetry, const Backend& backend, const Plan& plan,
                   std::uint64_t total_scores)
    : telemetry_(telemetry),
      backend_(backend),
      subproblems_(plan.subproblem_count()),
      total_scores_(total_scores),
      flops_per_score_(4.0 * static_cast<double>(plan.problem().head_dim)),
      terminal_(isatty(STDERR_FILENO) != 0),
      thread_([this] {
        const std::chrono::milliseconds period(terminal_ ? 200 : 30000);
        std::unique_lock lock(mutex_);
        while (!ended_.wait_for(lock, period, [this] { return end_; })) show(false);
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
  // The backend counts while a kernel runs, masked scores of partial tiles included.
  const auto scores = static_cast<double>(std::min(
      std::max(telemetry_.scores_done(), telemetry_.restored_scores() + backend_.scores_computed()),
      total_scores_));
  const double done = total_scores_ > 0 ? scores / static_cast<double>(total_scores_) : 1.0;
  // Time is judged by what this run does itself.
  const auto restored = static_cast<double>(telemetry_.restored_scores());
  const double own = scores - restored;
  const double elapsed = now_seconds() - begin_;
  const std::string left =
      own > 0
          ? format_duration(elapsed / own * (static_cast<double>(total_scores_) - scores)) + " left"
          : "time left unknown";
  const std::string line = fmt::format(
      "{:5.1f}%  {} of {} subproblems  {}  {}", done * 100, telemetry_.subproblems_done(),
      subproblems_, format_flops(own * flops_per_score_ / std::max(elapsed, 1e-9)),
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
