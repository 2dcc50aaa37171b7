// What merge threads tell the communication thread.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace stream_cqsa {

/// Counts the pieces of subproblems that have been merged. Thread-safe.
class MergedList {
 public:
  void add(std::int64_t subproblem) {
    const std::scoped_lock lock(mutex_);
    ++pieces_[subproblem];
  }
  /// Those added since the last call, by subproblem.
  std::map<std::int64_t, std::int64_t> take() {
    const std::scoped_lock lock(mutex_);
    return std::exchange(pieces_, {});
  }

 private:
  std::mutex mutex_;
  std::map<std::int64_t, std::int64_t> pieces_;
};

}  // namespace stream_cqsa
