#include "cuda/lanes.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "cuda/check.hpp"

namespace stream_cqsa::cuda {
namespace {

std::exception_ptr cancellation() { return std::make_exception_ptr(Error("cancelled")); }

}  // namespace

Lanes::Lanes(int device, Telemetry& telemetry)
    : device_(device),
      telemetry_(telemetry),
      queues_([this](Pending& pending, Queues::Lock& lock) { return finish(pending, lock); }) {}

// Under the lock throughout: an event that is waited for here cannot be given to other work
// meanwhile.
Ticket Lanes::submit(Lane lane, const Submission& submission, std::span<const Ticket> after) {
  const auto lock = queues_.lock();
  Pending pending{
      submission.call, submission.stage, submission.bytes, submission.subproblem, {}, {}, {}};
  pending.failure = failure_before(lane, after);
  if (!pending.failure) {
    try {
      use_device(device_);
      enqueue(lane, pending, submission, after);
    } catch (const std::exception& error) {
      pending.failure = failure_to_submit(lane, pending, error);
    }
  }
  return queues_.push(lane, std::move(pending));
}

// What has failed already of all that work comes after: the device, its lane, what it waits for.
std::exception_ptr Lanes::failure_before(Lane lane, std::span<const Ticket> after) const {
  if (device_failure_) return device_failure_;
  if (cancelled_) return cancellation();
  const auto failure_of = [this](Ticket ticket) {
    if (const std::exception_ptr failure = queues_.failure_of(ticket)) return failure;
    const Pending* before = queues_.find(ticket);
    return before != nullptr ? before->failure : nullptr;
  };
  if (const std::exception_ptr failure = failure_of(queues_.last(lane))) return failure;
  for (const Ticket ticket : after) {
    if (const std::exception_ptr failure = failure_of(ticket)) return failure;
  }
  return nullptr;
}

void Lanes::enqueue(Lane lane, Pending& pending, const Submission& submission,
                    std::span<const Ticket> after) {
  const cudaStream_t to = stream(lane);
  for (const Ticket ticket : after) {
    const Pending* before = queues_.find(ticket);
    if (before == nullptr || ticket.lane == lane) continue;
    STREAM_CQSA_CUDA_CHECK(cudaStreamWaitEvent(to, before->end->get(), 0));
  }
  Event begin = take_event();
  Event end = take_event();
  STREAM_CQSA_CUDA_CHECK(cudaEventRecord(begin.get(), to));
  submission.enqueue(to);
  STREAM_CQSA_CUDA_CHECK(cudaEventRecord(end.get(), to));
  pending.begin = std::move(begin);
  pending.end = std::move(end);
}

// A device that has failed refuses every call, a query too: then this submission is not to blame.
std::exception_ptr Lanes::failure_to_submit(Lane lane, const Pending& pending,
                                            const std::exception& error) {
  const cudaError_t status = cudaStreamQuery(stream(lane));
  static_cast<void>(cudaGetLastError());  // not ready is no error of a later call
  if (status != cudaSuccess && status != cudaErrorNotReady) return fail_device(pending, status);
  return std::make_exception_ptr(
      Error(fmt::format("subproblem {}: {}: {}", pending.subproblem, pending.call, error.what())));
}

Event Lanes::take_event() {
  if (spare_events_.empty()) return {};
  Event event = std::move(spare_events_.back());
  spare_events_.pop_back();
  return event;
}

void Lanes::quiesce() noexcept {
  queues_.quiesce();
  // Work that failed half enqueued has no event: its first copies may still be under way. Errors
  // are of work whose ticket has them.
  static_cast<void>(cudaSetDevice(device_));
  for (const Stream& stream : streams_) static_cast<void>(cudaStreamSynchronize(stream.get()));
  static_cast<void>(cudaGetLastError());
}

std::exception_ptr Lanes::finish(Pending& pending, Queues::Lock& lock) {
  if (!pending.end) return pending.failure;
  lock.unlock();
  const cudaError_t status = await(pending);
  lock.lock();
  std::exception_ptr failure;
  if (status != cudaSuccess) {
    failure = fail_device(pending, status);
  } else if (cancelled_) {
    failure = cancellation();
  }
  for (auto* event : {&pending.begin, &pending.end}) spare_events_.push_back(std::move(**event));
  return failure;
}

// Waits until the device has ended the work, and records when it ran.
cudaError_t Lanes::await(const Pending& pending) {
  static_cast<void>(cudaSetDevice(device_));  // a device that has failed says so below
  float milliseconds = 0;
  cudaError_t status = cudaEventSynchronize(pending.end->get());
  if (status == cudaSuccess) {
    status = cudaEventElapsedTime(&milliseconds, pending.begin->get(), pending.end->get());
  }
  if (status == cudaSuccess) {
    const double end = now_seconds();
    telemetry_.record(pending.stage, {end - 1e-3 * milliseconds, end}, pending.bytes,
                      pending.subproblem);
  }
  return status;
}

// An error on the device is seen by every call of every lane from then on. It is described once, by
// the first to see it; it most likely comes from the kernel that has been under way the longest.
std::exception_ptr Lanes::fail_device(const Pending& observed, cudaError_t status) {
  if (device_failure_) return device_failure_;
  const auto& kernels = queues_.pending(Lane::compute);
  const auto oldest = std::find_if(kernels.begin(), kernels.end(),
                                   [](const Pending& kernel) { return kernel.end.has_value(); });
  const Pending& blamed = oldest == kernels.end() ? observed : *oldest;
  device_failure_ = std::make_exception_ptr(
      Error(fmt::format("subproblem {}: {}: {} on the CUDA device", blamed.subproblem, blamed.call,
                        cudaGetErrorString(status))));
  return device_failure_;
}

}  // namespace stream_cqsa::cuda
