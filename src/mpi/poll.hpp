// How a thread waits for messages and for other threads at once.
#pragma once

#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <thread>

namespace stream_cqsa {

/// The pauses of a polling loop: none while there is something to do, then longer and longer ones,
/// so that waiting costs no core. One thread's own.
class Pause {
 public:
  Pause() {
    // The kernel otherwise adds 50 microseconds to every sleep.
    ::prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
  }

  /// `under_way`: a message is being sent or has been asked for. It goes on inside calls of MPI
  /// alone, so the loop goes on for some milliseconds, and the pauses stay short after that.
  void after(bool did_something, bool under_way) {
    using namespace std::chrono_literals;
    const auto now = std::chrono::steady_clock::now();
    if (did_something) {
      last_ = now;
      pause_ = 10us;
      return;
    }
    if (now - last_ < (under_way ? 3000us : 100us)) return std::this_thread::yield();
    std::this_thread::sleep_for(pause_);
    pause_ = std::min<std::chrono::microseconds>(2 * pause_, under_way ? 20us : 1000us);
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  std::chrono::microseconds pause_{10};
};

}  // namespace stream_cqsa
