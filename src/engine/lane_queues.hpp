// What the lanes of every backend have in common: queues, a thread each, tickets and failures.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

/// A first-in first-out queue of work for each lane, and a thread that sees each piece to its end.
/// When a piece fails, it and everything later in its lane counts as failed.
///
/// Memory is bounded by what is queued: of completed work a lane keeps their number and its first
/// failure.
template <class Work>
class LaneQueues {
 public:
  using Lock = std::unique_lock<std::mutex>;
  /// Sees a piece of work to its end, on its lane's thread; returns its failure. It is called under
  /// the lock and may release it meanwhile: until it returns the piece is pending.
  using Finish = std::function<std::exception_ptr(Work&, Lock&)>;

  /// Throws Error when the system has no threads for the lanes.
  explicit LaneQueues(Finish finish) : finish_(std::move(finish)) {
    try {
      for (Queue& queue : queues_) queue.thread = std::thread([this, &queue] { serve(queue); });
    } catch (const std::system_error& error) {
      stop();
      throw Error(
          fmt::format("{} threads for copies and launches cannot be started ({}); raise the "
                      "limit on processes or memory",
                      lane_count, error.what()));
    }
  }
  /// Sees what is queued to its end.
  ~LaneQueues() { stop(); }
  LaneQueues(const LaneQueues&) = delete;
  LaneQueues& operator=(const LaneQueues&) = delete;

  /// What push() to await() are called under.
  Lock lock() { return Lock(mutex_); }

  Ticket push(Lane lane, Work work) {
    queue(lane).pending.push_back(std::move(work));
    queue(lane).arrived.notify_one();
    return last(lane);
  }
  /// What was pushed into the lane last.
  Ticket last(Lane lane) const {
    return {lane, queue(lane).completed + queue(lane).pending.size()};
  }
  /// The first is the oldest that is not complete.
  const std::deque<Work>& pending(Lane lane) const { return queue(lane).pending; }
  /// None where the ticket is complete.
  const Work* find(Ticket ticket) const {
    const Queue& from = queue(ticket.lane);
    if (ticket.sequence <= from.completed) return nullptr;
    return &from.pending[ticket.sequence - from.completed - 1];
  }
  /// Of the ticket's work or something before it in its lane, once that has ended.
  std::exception_ptr failure_of(Ticket ticket) const {
    const Queue& from = queue(ticket.lane);
    const bool failed = from.first_failed != 0 && ticket.sequence >= from.first_failed;
    return failed ? from.failure : nullptr;
  }
  /// Blocks until `ticket` is complete, well or not. The lock is released meanwhile.
  void await(Lock& lock, Ticket ticket) {
    completion_.wait(lock, [&] { return queue(ticket.lane).completed >= ticket.sequence; });
  }

  /// Blocks until `ticket` is complete; throws the failure that it or what it waited for had.
  void wait(Ticket ticket) {
    Lock own = lock();
    await(own, ticket);
    if (const std::exception_ptr failure = failure_of(ticket)) std::rethrow_exception(failure);
  }
  /// Blocks until nothing is pending.
  void quiesce() noexcept {
    Lock own = lock();
    completion_.wait(own, [this] {
      return std::all_of(queues_.begin(), queues_.end(),
                         [](const Queue& queue) { return queue.pending.empty(); });
    });
  }
  /// Later work does not count as failed for what failed before. Nothing may be pending.
  void forget_failures() {
    const Lock own = lock();
    for (Queue& queue : queues_) {
      queue.failure = nullptr;
      queue.first_failed = 0;
    }
  }

 private:
  struct Queue {
    std::deque<Work> pending;
    std::uint64_t completed = 0;
    std::uint64_t first_failed = 0;  ///< 0: none
    std::exception_ptr failure;
    std::condition_variable arrived;
    std::thread thread;
  };

  Queue& queue(Lane lane) { return queues_[static_cast<std::size_t>(lane)]; }
  const Queue& queue(Lane lane) const { return queues_[static_cast<std::size_t>(lane)]; }

  void serve(Queue& queue) {
    Lock own = lock();
    while (true) {
      queue.arrived.wait(own, [&] { return stopping_ || !queue.pending.empty(); });
      if (queue.pending.empty()) return;
      // Only this thread removes from the front, and a deque's elements stay where they are.
      const std::exception_ptr failure = finish_(queue.pending.front(), own);
      if (failure && !queue.failure) {
        queue.failure = failure;
        queue.first_failed = queue.completed + 1;
      }
      queue.pending.pop_front();
      ++queue.completed;
      completion_.notify_all();
    }
  }

  void stop() noexcept {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    for (Queue& queue : queues_) {
      queue.arrived.notify_one();
      if (queue.thread.joinable()) queue.thread.join();
    }
  }

  const Finish finish_;
  std::mutex mutex_;
  std::condition_variable completion_;
  bool stopping_ = false;
  std::array<Queue, lane_count> queues_;
};

}  // namespace stream_cqsa
