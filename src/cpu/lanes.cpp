#include "cpu/lanes.hpp"

#include <utility>

namespace stream_cqsa {

Lanes::Lanes()
    : queues_([this](Work& work, Queues::Lock& lock) { return run_when_ready(work, lock); }) {}

Ticket Lanes::submit(Lane lane, std::function<void()> work, std::span<const Ticket> after) {
  const auto lock = queues_.lock();
  Work pending{std::move(work), {after.begin(), after.end()}};
  pending.after.push_back(queues_.last(lane));
  return queues_.push(lane, std::move(pending));
}

std::exception_ptr Lanes::run_when_ready(Work& work, Queues::Lock& lock) {
  for (const Ticket ticket : work.after) {
    queues_.await(lock, ticket);
    if (const std::exception_ptr failure = queues_.failure_of(ticket)) return failure;
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
