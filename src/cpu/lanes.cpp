#include "cpu/lanes.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <system_error>
#include <utility>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

Lanes::Lanes() {
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

Lanes::~Lanes() {
  quiesce();
  stop();
}

void Lanes::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  for (Queue& queue : queues_) {
    queue.arrived.notify_one();
    if (queue.thread.joinable()) queue.thread.join();
  }
}

Ticket Lanes::submit(Lane lane, std::function<void()> work, std::span<const Ticket> after) {
  Queue& to = queue(lane);
  Ticket ticket{lane, 0};
  {
    const std::lock_guard lock(mutex_);
    to.waiting.push_back({std::move(work), {after.begin(), after.end()}});
    ticket.sequence = ++to.submitted;
  }
  to.arrived.notify_one();
  return ticket;
}

std::exception_ptr Lanes::failure_of(Ticket ticket) {
  const Queue& from = queue(ticket.lane);
  const bool failed = from.first_failed != 0 && ticket.sequence >= from.first_failed;
  return failed ? from.failure : nullptr;
}

void Lanes::wait(Ticket ticket) {
  std::unique_lock lock(mutex_);
  completion_.wait(lock, [&] { return complete(ticket); });
  if (const std::exception_ptr failure = failure_of(ticket)) std::rethrow_exception(failure);
}

void Lanes::quiesce() noexcept {
  std::unique_lock lock(mutex_);
  completion_.wait(lock, [this] {
    return std::all_of(queues_.begin(), queues_.end(),
                       [](const Queue& queue) { return queue.completed == queue.submitted; });
  });
}

void Lanes::serve(Queue& queue) {
  std::unique_lock lock(mutex_);
  while (true) {
    queue.arrived.wait(lock, [&] { return stopping_ || !queue.waiting.empty(); });
    if (queue.waiting.empty()) return;
    {
      Work work = std::move(queue.waiting.front());
      queue.waiting.pop_front();
      const std::exception_ptr failure =
          queue.failure != nullptr ? queue.failure : run_when_ready(lock, work);
      if (failure != nullptr && queue.failure == nullptr) {
        queue.failure = failure;
        queue.first_failed = queue.completed + 1;
      }
    }
    ++queue.completed;
    completion_.notify_all();
  }
}

std::exception_ptr Lanes::run_when_ready(std::unique_lock<std::mutex>& lock, Work& work) {
  for (const Ticket ticket : work.after) {
    completion_.wait(lock, [&] { return complete(ticket); });
    if (const std::exception_ptr failure = failure_of(ticket)) return failure;
  }
  lock.unlock();
  std::exception_ptr failure;
  try {
    work.run();
  } catch (...) {
    failure = std::current_exception();
  }
  lock.lock();
  return failure;
}

}  // namespace stream_cqsa
