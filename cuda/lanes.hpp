// The CUDA backend's lanes: a stream each, and a thread that follows it.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cuda/handles.hpp"
#include "engine/lane_queues.hpp"
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
  ~Lanes() { quiesce(); }
  Lanes(const Lanes&) = delete;
  Lanes& operator=(const Lanes&) = delete;

  Ticket submit(Lane lane, const Submission& submission, std::span<const Ticket> after);

  /// Blocks until `ticket` is complete; throws the failure that it or what it waited for had.
  void wait(Ticket ticket) { queues_.wait(ticket); }

  /// What has not ended yet counts as failed, and nothing more is enqueued.
  void cancel() noexcept { cancelled_ = true; }

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
  using Queues = LaneQueues<Pending>;

  cudaStream_t stream(Lane lane) const { return streams_[static_cast<std::size_t>(lane)].get(); }
  std::exception_ptr failure_before(Lane lane, std::span<const Ticket> after) const;
  void enqueue(Lane lane, Pending& pending, const Submission& submission,
               std::span<const Ticket> after);
  std::exception_ptr failure_to_submit(Lane lane, const Pending& pending,
                                       const std::exception& error);
  std::exception_ptr fail_device(const Pending& observed, cudaError_t status);
  Event take_event();
  std::exception_ptr finish(Pending& pending, Queues::Lock& lock);
  cudaError_t await(const Pending& pending);

  const int device_;
  Telemetry& telemetry_;
  std::array<Stream, lane_count> streams_;
  std::atomic<bool> cancelled_{false};
  // Under the queues' lock.
  std::exception_ptr device_failure_;  ///< of all lanes
  std::vector<Event> spare_events_;
  Queues queues_;  // last: its threads end before what they use
};

}  // namespace stream_cqsa::cuda
