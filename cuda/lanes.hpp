// The CUDA backend's lanes: a stream each, and a thread that follows it.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "cuda/handles.hpp"
#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa::cuda {

/// What is put on a lane's stream, and how it is recorded.
struct Submission {
  std::string call;  ///< for messages: "copy in"
  Stage stage = Stage::compute;
  std::int64_t bytes = 0;
  std::int64_t subproblem = 0;
  std::function<void(cudaStream_t)> enqueue;
};

/// Work is enqueued by the submitting thread, at once; the device waits for the tickets that it
/// comes after. A thread per lane waits for each piece in turn, records its time on the device, and
/// says that it is complete. After a failure everything later in the lane, and everything that
/// waits for it, counts as failed and is not enqueued. An error on the device fails all lanes, with
/// one message.
class Lanes {
 public:
  /// `device` is current for the calling thread.
  Lanes(int device, Telemetry& telemetry);
  /// Waits for what is enqueued.
  ~Lanes();
  Lanes(const Lanes&) = delete;
  Lanes& operator=(const Lanes&) = delete;

  Ticket submit(Lane lane, const Submission& submission, std::span<const Ticket> after);

  /// Blocks until `ticket` is complete; throws the failure that it or what it waited for had.
  void wait(Ticket ticket);

  /// Blocks until everything submitted has ended, that which failed half enqueued too.
  void quiesce() noexcept;

 private:
  struct Pending {
    std::string call;
    Stage stage;
    std::int64_t bytes;
    std::int64_t subproblem;
    std::optional<Event> begin, end;  ///< none: it was not enqueued
    std::exception_ptr failure;       ///< why not
  };
  struct Queue {
    Stream stream;
    std::deque<Pending> pending;  ///< the first is number completed + 1
    std::uint64_t completed = 0;
    std::uint64_t first_failed = 0;  ///< 0: none
    std::exception_ptr failure;
    std::condition_variable arrived;
    std::thread thread;
  };

  Queue& queue(Lane lane) { return queues_[static_cast<std::size_t>(lane)]; }
  const Pending* pending_of(Ticket ticket);
  std::exception_ptr failure_before(Queue& to, std::span<const Ticket> after);
  void enqueue(Queue& to, Pending& pending, const Submission& submission,
               std::span<const Ticket> after);
  std::exception_ptr failure_to_submit(Queue& to, const Pending& pending,
                                       const std::exception& error);
  std::exception_ptr fail_device(const Pending& observed, cudaError_t status);
  Event take_event();
  std::exception_ptr failure_of(Ticket ticket);
  void follow(Queue& queue);
  void stop() noexcept;
  std::exception_ptr await(std::unique_lock<std::mutex>& lock, Pending& pending);

  const int device_;
  Telemetry& telemetry_;
  std::mutex mutex_;
  std::condition_variable completion_;
  bool stopping_ = false;
  std::exception_ptr device_failure_;  ///< of all lanes
  std::vector<Event> spare_events_;
  std::array<Queue, lane_count> queues_;
};

}  // namespace stream_cqsa::cuda
