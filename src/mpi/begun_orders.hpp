// Which of a worker's orders can still be withdrawn.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <set>

namespace stream_cqsa {

/// Orders are begun in ascending order of their numbers, which begin with 1, but for those that
/// were withdrawn before. Thread-safe.
class BegunOrders {
 public:
  /// Asked before each part of an order is computed: false where the order was withdrawn.
  bool begin(std::int64_t order) {
    const std::scoped_lock lock(mutex_);
    if (withdrawn_.contains(order)) return false;
    last_begun_ = std::max(last_begun_, order);
    return true;
  }
  /// False where the order has begun.
  bool withdraw(std::int64_t order) {
    const std::scoped_lock lock(mutex_);
    return order > last_begun_ && withdrawn_.insert(order).second;
  }
  bool is_withdrawn(std::int64_t order) const {
    const std::scoped_lock lock(mutex_);
    return withdrawn_.contains(order);
  }

 private:
  mutable std::mutex mutex_;
  std::int64_t last_begun_ = 0;
  std::set<std::int64_t> withdrawn_;
};

}  // namespace stream_cqsa
