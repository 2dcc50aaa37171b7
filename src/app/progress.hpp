// Progress on standard error: a bar on a terminal, a line every 30 s in a batch log.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

/// Shows the progress of a run from construction to destruction.
class Progress {
 public:
  /// total_scores: live scores of the whole run, over all batch entries and query heads.
  Progress(const Telemetry& telemetry, const Backend& backend, const Plan& plan,
           std::uint64_t total_scores);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

 private:
  void show(bool last) const;

  const Telemetry& telemetry_;
  const Backend& backend_;
  std::int64_t subproblems_;
  std::uint64_t total_scores_;
  double flops_per_score_;
  bool terminal_;
  double begin_ = now_seconds();
  std::mutex mutex_;
  std::condition_variable ended_;
  bool end_ = false;
  std::thread thread_;
};

}  // namespace stream_cqsa
