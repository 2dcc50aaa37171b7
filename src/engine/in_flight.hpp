// Submitted work whose end the host has something to do with.
#pragma once

#include <deque>
#include <functional>
#include <optional>
#include <utility>

#include "engine/monitor.hpp"
#include "stream_cqsa/backend.hpp"

namespace stream_cqsa {

/// Work of a backend on its way, with what is to be done when it is complete; ended in the order in
/// which it was added. One thread's own.
class InFlight {
 public:
  explicit InFlight(Backend& backend) : backend_(backend) {}

  bool empty() const { return work_.empty(); }
  void add(Ticket ticket, std::function<void()> end) { work_.emplace_back(ticket, std::move(end)); }

  /// Waits for the oldest, and does what is to be done then.
  void end_oldest() {
    const auto [ticket, end] = std::move(work_.front());
    work_.pop_front();
    backend_.wait(ticket);
    end();
  }

  /// Takes what comes through the queue until that is closed, and ends what `submit` adds to this.
  /// What has come is submitted first, so that the device never waits for the host to wake up.
  template <class Item, class Submit>
  void serve(BoundedQueue<Item>& queue, Submit submit) {
    while (true) {
      if (const std::optional<Item> item = empty() ? queue.pop() : queue.try_pop()) {
        submit(*item);
      } else if (empty()) {
        return;
      } else {
        end_oldest();
      }
    }
  }

  /// A buffer by `attempt` (bool(Buffer&)); what is in flight is ended as long as there is none,
  /// since it may hold them all. With nothing in flight, by `wait` (Buffer()).
  template <class Buffer, class Attempt, class Wait>
  Buffer take(Attempt attempt, Wait wait) {
    Buffer buffer;
    while (!attempt(buffer)) {
      if (empty()) return wait();
      end_oldest();
    }
    return buffer;
  }

 private:
  Backend& backend_;
  std::deque<std::pair<Ticket, std::function<void()>>> work_;
};

}  // namespace stream_cqsa
