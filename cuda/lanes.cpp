#include "cuda/lanes.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "cuda/check.hpp"

namespace stream_cqsa::cuda {

Lanes::Lanes(int device, Telemetry& telemetry) : device_(device), telemetry_(telemetry) {
  try {
    for (Queue& queue : queues_) queue.thread = std::thread([this, &queue] { follow(queue); });
  } catch (...) {
    stop();
    throw;
  }
}

Lanes::~Lanes() {
  quiesce();
  stop();
}

void Lanes::stop() noexcept {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  for (Queue& queue : queues_) {
    queue.arrived.notify_one();
    if (queue.thread.joinable()) queue.thread.join();
  }
}

Ticket Lanes::submit(Lane lane, const Submission& submission, std::span<const Ticket> after) {
  Queue& to = queue(lane);
  const std::lock_guard lock(mutex_);
  Pending pending{
      submission.call, submission.stage, submission.bytes, submission.subproblem, {}, {}, {}};
  pending.failure = failure_before(to, after);
  if (!pending.failure) {
    try {
      use_device(device_);
      enqueue(to, pending, submission, after);
    } catch (const std::exception& error) {
      pending.failure = failure_to_submit(to, pending, error);
    }
  }
  to.pending.push_back(std::move(pending));
  to.arrived.notify_one();
  return {lane, to.completed + to.pending.size()};
}

// What has failed already of all that work comes after: the device, its lane, what it waits for.
std::exception_ptr Lanes::failure_before(Queue& to, std::span<const Ticket> after) {
  if (device_failure_) return device_failure_;
  if (to.failure) return to.failure;
  if (!to.pending.empty() && to.pending.back().failure) return to.pending.back().failure;
  for (const Ticket ticket : after) {
    if (const std::exception_ptr failure = failure_of(ticket)) return failure;
    const Pending* before = pending_of(ticket);
    if (before != nullptr && before->failure) return before->failure;
  }
  return nullptr;
}

// Under the lock: an event that is waited for here cannot be given to other work meanwhile.
void Lanes::enqueue(Queue& to, Pending& pending, const Submission& submission,
                    std::span<const Ticket> after) {
  for (const Ticket ticket : after) {
    const Pending* before = pending_of(ticket);
    if (before == nullptr || &queue(ticket.lane) == &to) continue;
    STREAM_CQSA_CUDA_CHECK(cudaStreamWaitEvent(to.stream.get(), before->end->get(), 0));
  }
  Event begin = take_event();
  Event end = take_event();
  STREAM_CQSA_CUDA_CHECK(cudaEventRecord(begin.get(), to.stream.get()));
  submission.enqueue(to.stream.get());
  STREAM_CQSA_CUDA_CHECK(cudaEventRecord(end.get(), to.stream.get()));
  pending.begin = std::move(begin);
  pending.end = std::move(end);
}

// A device that has failed refuses every call, a query too: then this submission is not to blame.
std::exception_ptr Lanes::failure_to_submit(Queue& to, const Pending& pending,
                                            const std::exception& error) {
  const cudaError_t status = cudaStreamQuery(to.stream.get());
  static_cast<void>(cudaGetLastError());  // not ready is no error of a later call
  if (status != cudaSuccess && status != cudaErrorNotReady) return fail_device(pending, status);
  return std::make_exception_ptr(
      Error(fmt::format("subproblem {}: {}: {}", pending.subproblem, pending.call, error.what())));
}

// None where the ticket is complete.
const Lanes::Pending* Lanes::pending_of(Ticket ticket) {
  const Queue& from = queue(ticket.lane);
  if (ticket.sequence <= from.completed) return nullptr;
  return &from.pending[ticket.sequence - from.completed - 1];
}

Event Lanes::take_event() {
  if (spare_events_.empty()) return {};
  Event event = std::move(spare_events_.back());
  spare_events_.pop_back();
  return event;
}

std::exception_ptr Lanes::failure_of(Ticket ticket) {
  const Queue& from = queue(ticket.lane);
  const bool failed = from.first_failed != 0 && ticket.sequence >= from.first_failed;
  return failed ? from.failure : nullptr;
}

void Lanes::wait(Ticket ticket) {
  std::unique_lock lock(mutex_);
  completion_.wait(lock, [&] { return queue(ticket.lane).completed >= ticket.sequence; });
  if (const std::exception_ptr failure = failure_of(ticket)) std::rethrow_exception(failure);
}

void Lanes::quiesce() noexcept {
  {
    std::unique_lock lock(mutex_);
    completion_.wait(lock, [this] {
      return std::all_of(queues_.begin(), queues_.end(),
                         [](const Queue& queue) { return queue.pending.empty(); });
    });
  }
  // Work that failed half enqueued has no event: its first copies may still be under way. Errors
  // are of work whose ticket has them.
  static_cast<void>(cudaSetDevice(device_));
  for (const Queue& queue : queues_) static_cast<void>(cudaStreamSynchronize(queue.stream.get()));
  static_cast<void>(cudaGetLastError());
}

void Lanes::follow(Queue& queue) {
  static_cast<void>(cudaSetDevice(device_));  // a device that has failed says so in await()
  std::unique_lock lock(mutex_);
  while (true) {
    queue.arrived.wait(lock, [&] { return stopping_ || !queue.pending.empty(); });
    if (queue.pending.empty()) return;
    // Only this thread removes from the front, and a deque's elements stay where they are.
    Pending& first = queue.pending.front();
    const std::exception_ptr failure = await(lock, first);
    if (failure && !queue.failure) {
      queue.failure = failure;
      queue.first_failed = queue.completed + 1;
    }
    for (auto* event : {&first.begin, &first.end}) {
      if (*event) spare_events_.push_back(std::move(**event));
    }
    queue.pending.pop_front();
    ++queue.completed;
    completion_.notify_all();
  }
}

// Waits for the first piece of a lane. The lock is released meanwhile.
std::exception_ptr Lanes::await(std::unique_lock<std::mutex>& lock, Pending& pending) {
  if (!pending.end) return pending.failure;
  lock.unlock();
  cudaError_t status = cudaEventSynchronize(pending.end->get());
  float milliseconds = 0;
  if (status == cudaSuccess) {
    status = cudaEventElapsedTime(&milliseconds, pending.begin->get(), pending.end->get());
  }
  if (status == cudaSuccess) {
    const double end = now_seconds();
    telemetry_.record(pending.stage, {end - 1e-3 * milliseconds, end}, pending.bytes,
                      pending.subproblem);
  }
  lock.lock();
  return status == cudaSuccess ? nullptr : fail_device(pending, status);
}

// An error on the device is seen by every call of every lane from then on. It is described once, by
// the first to see it; it most likely comes from the kernel that has been under way the longest.
std::exception_ptr Lanes::fail_device(const Pending& observed, cudaError_t status) {
  if (device_failure_) return device_failure_;
  const auto& kernels = queue(Lane::compute).pending;
  const auto oldest = std::find_if(kernels.begin(), kernels.end(),
                                   [](const Pending& kernel) { return kernel.end.has_value(); });
  const Pending& blamed = oldest == kernels.end() ? observed : *oldest;
  device_failure_ = std::make_exception_ptr(
      Error(fmt::format("subproblem {}: {}: {} on the CUDA device", blamed.subproblem, blamed.call,
                        cudaGetErrorString(status))));
  return device_failure_;
}

}  // namespace stream_cqsa::cuda
