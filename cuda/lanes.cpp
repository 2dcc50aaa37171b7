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
  use_device(device_);
  Queue& to = queue(lane);
  const std::lock_guard lock(mutex_);
  Pending pending{
      submission.call, submission.stage, submission.bytes, submission.subproblem, {}, {}, {}};
  try {
    enqueue(to, pending, submission, after);
  } catch (const std::exception& error) {
    pending.failure = std::make_exception_ptr(Error(fmt::format(
        "subproblem {}: {}: {}", submission.subproblem, submission.call, error.what())));
  }
  to.pending.push_back(std::move(pending));
  to.arrived.notify_one();
  return {lane, to.completed + to.pending.size()};
}

// Under the lock: an event that is waited for here cannot be given to other work meanwhile.
void Lanes::enqueue(Queue& to, Pending& pending, const Submission& submission,
                    std::span<const Ticket> after) {
  for (const Ticket ticket : after) {
    pending.failure = failure_of(ticket);
    if (pending.failure) return;
    Queue& from = queue(ticket.lane);
    if (&from == &to || ticket.sequence <= from.completed) continue;
    const Pending& before = from.pending[ticket.sequence - from.completed - 1];
    pending.failure = before.failure;
    if (pending.failure) return;
    STREAM_CQSA_CUDA_CHECK(cudaStreamWaitEvent(to.stream.get(), before.end->get(), 0));
  }
  Event begin = take_event();
  Event end = take_event();
  STREAM_CQSA_CUDA_CHECK(cudaEventRecord(begin.get(), to.stream.get()));
  submission.enqueue(to.stream.get());
  STREAM_CQSA_CUDA_CHECK(cudaEventRecord(end.get(), to.stream.get()));
  pending.begin = std::move(begin);
  pending.end = std::move(end);
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
  std::unique_lock lock(mutex_);
  completion_.wait(lock, [this] {
    return std::all_of(queues_.begin(), queues_.end(),
                       [](const Queue& queue) { return queue.pending.empty(); });
  });
}

void Lanes::follow(Queue& queue) {
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
  if (status == cudaSuccess) return nullptr;
  return std::make_exception_ptr(Error(
      fmt::format("{}: {} on the CUDA device", culprit(pending), cudaGetErrorString(status))));
}

// An error on the device is seen by every lane at once; it most likely comes from a kernel.
std::string Lanes::culprit(const Pending& observed) {
  const auto& kernels = queue(Lane::compute).pending;
  const Pending& work = kernels.empty() ? observed : kernels.front();
  return fmt::format("subproblem {}: {}", work.subproblem, work.call);
}

}  // namespace stream_cqsa::cuda
