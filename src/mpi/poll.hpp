// How a thread waits for messages and for other threads at once.
#pragma once

#include <algorithm>
#include <chrono>
#include <thread>

namespace stream_cqsa {

/// The pauses of a polling loop: none while there is something to do, then longer and longer ones,
/// so that waiting costs no core.
class Pause {
 public:
  /// `under_way`: a message is being sent or has been asked for. It goes on inside calls of MPI
  /// alone, so the pauses stay short.
  void after(bool did_something, bool under_way) {
    using std::chrono::microseconds;
    if (did_something) {
      idle_ = 0;
      return;
    }
    if (++idle_ <= spins) return std::this_thread::yield();
    const microseconds longest(under_way ? 50 : 1000);
    std::this_thread::sleep_for(std::min(microseconds(20) * (idle_ - spins), longest));
  }

 private:
  static constexpr int spins = 50;
  int idle_ = 0;
};

}  // namespace stream_cqsa
