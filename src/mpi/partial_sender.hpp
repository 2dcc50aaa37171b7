// Partials of a worker on their way to the master.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <vector>

#include "engine/monitor.hpp"
#include "engine/partial.hpp"
#include "mpi/communicator.hpp"
#include "mpi/protocol.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// Takes partials from the pipeline's threads and offers them to the master, which asks for their
/// states when it has room. A buffer is free again when its states have been sent.
class PartialSender : public PartialReceiver {
 public:
  /// `memory` holds the plan's state buffers.
  PartialSender(const Plan& plan, std::byte* memory, Communicator& communicator, Abort& abort);

  // For the pipeline's threads.
  bool try_buffer(Buffer& buffer) override;
  Buffer wait_buffer() override;
  void deliver(const Partial& partial) override;
  void end_of_subproblem(std::int64_t id) override;
  /// Accumulators are never on a worker's device.
  bool try_output_buffer(Buffer&) override;
  Buffer wait_output_buffer() override;
  void deliver_finished(const FinishedRows&) override;

  // For the communication thread.
  /// Sends what there is to send. True where anything was. What a lost rank will not take is
  /// dropped: the caller's part is to notice.
  bool send();
  /// Nothing waits to be sent and nothing is being sent.
  bool empty() const;

 private:
  struct States {
    Request request;
    std::int32_t buffer = 0;
  };
  struct Header {
    Message message;
    Request request;
  };
  struct Waiting {
    Message message;
    SoftmaxStates states;  ///< of an offer
  };
  void send_one(const Waiting& waiting);
  std::byte* data_of(std::int32_t buffer) const { return memory_ + buffer * buffer_bytes_; }

  std::byte* memory_;
  std::int64_t buffer_bytes_;
  Communicator& communicator_;
  Pool<std::int32_t> buffers_;
  mutable std::mutex mutex_;  // guards waiting_ and offered_
  std::deque<Waiting> waiting_;
  std::map<std::int64_t, std::int64_t> offered_;  ///< partials, by subproblem
  // The communication thread's own.
  std::list<Header> headers_;
  std::list<States> states_;
};

}  // namespace stream_cqsa
