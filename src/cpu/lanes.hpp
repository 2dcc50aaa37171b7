// The CPU backend's lanes: first-in first-out queues with dependencies between them.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "stream_cqsa/backend.hpp"

namespace stream_cqsa {

/// One thread per lane, each serving its queue in order. A piece of work starts when the tickets it
/// comes after are complete. When it throws, it and everything that waits for it, later work of its
/// own lane included, counts as failed and is not run.
///
/// Memory is bounded by what is queued: of completed work a lane keeps their number and its first
/// failure.
class Lanes {
 public:
  /// Throws Error when the system has no threads for them.
  Lanes();
  /// Runs what is queued to its end.
  ~Lanes();
  Lanes(const Lanes&) = delete;
  Lanes& operator=(const Lanes&) = delete;

  /// Queues `work`. The tickets in `after` must have been submitted already.
  Ticket submit(Lane lane, std::function<void()> work, std::span<const Ticket> after);

  /// Blocks until `ticket` is complete; throws the failure that it or what it waited for had.
  void wait(Ticket ticket);

  /// Blocks until everything submitted has ended.
  void quiesce() noexcept;

 private:
  struct Work {
    std::function<void()> run;
    std::vector<Ticket> after;
  };
  struct Queue {
    std::deque<Work> waiting;
    std::uint64_t submitted = 0;
    std::uint64_t completed = 0;
    std::uint64_t first_failed = 0;  // 0: none
    std::exception_ptr failure;
    std::condition_variable arrived;
    std::thread thread;
  };

  Queue& queue(Lane lane) { return queues_[static_cast<std::size_t>(lane)]; }
  bool complete(Ticket ticket) { return queue(ticket.lane).completed >= ticket.sequence; }
  std::exception_ptr failure_of(Ticket ticket);
  void stop();
  void serve(Queue& queue);
  std::exception_ptr run_when_ready(std::unique_lock<std::mutex>& lock, Work& work);

  std::mutex mutex_;
  std::condition_variable completion_;
  bool stopping_ = false;
  std::array<Queue, lane_count> queues_;
};

}  // namespace stream_cqsa
