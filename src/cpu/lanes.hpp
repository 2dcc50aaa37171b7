// The CPU backend's lanes: a thread each, which does the lane's work.
#pragma once

#include <exception>
#include <functional>
#include <span>
#include <vector>

#include "engine/lane_queues.hpp"
#include "stream_cqsa/backend.hpp"

namespace stream_cqsa {

/// A piece of work starts when the tickets it comes after are complete. When it throws, it and
/// everything that waits for it, later work of its own lane included, counts as failed and is not
/// run.
class Lanes {
 public:
  /// Throws Error when the system has no threads for them. At their end they run what is queued.
  Lanes();

  /// Queues `work`. The tickets in `after` must have been submitted already.
  Ticket submit(Lane lane, std::function<void()> work, std::span<const Ticket> after);

  /// Blocks until `ticket` is complete; throws the failure that it or what it waited for had.
  void wait(Ticket ticket) { queues_.wait(ticket); }

  /// Blocks until everything submitted has ended.
  void quiesce() noexcept { queues_.quiesce(); }

  /// Begins anew, where everything has ended.
  void forget_failures() { queues_.forget_failures(); }

 private:
  struct Work {
    std::function<void()> run;
    std::vector<Ticket> after;  ///< the lane's work before it among them
  };
  using Queues = LaneQueues<Work>;

  std::exception_ptr run_when_ready(Work& work, Queues::Lock& lock);

  Queues queues_;
};

}  // namespace stream_cqsa
