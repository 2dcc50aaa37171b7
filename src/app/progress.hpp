// Progress on standard error: a bar on a terminal, a line every 30 s in a batch log.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

/// How far some work is.
struct Progressed {
  double share = 0;   ///< 0 to 1
  double before = 0;  ///< of that, what an earlier run did
  std::string text;   ///< such as "3 of 7 subproblems"
};

/// Shows the progress of work from construction to destruction.
class Progress {
 public:
  /// `measure` gets the seconds since the beginning; it is called from another thread.
  using Measure = std::function<Progressed(double elapsed)>;
  explicit Progress(Measure measure);
  /// Of a run, on this rank's backend or, with none, on others'.
  /// total_scores: live scores of the whole run, over all batch entries and query heads.
  Progress(const Telemetry& telemetry, const Backend* backend, const Plan& plan,
           std::uint64_t total_scores);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

 private:
  void show(bool last) const;

  Measure measure_;
  bool terminal_;
  double begin_ = now_seconds();
  std::mutex mutex_;
  std::condition_variable ended_;
  bool end_ = false;
  std::thread thread_;
};

}  // namespace stream_cqsa
