// Partials of a worker on their way to the ranks that merge.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <vector>

#include "core/merge_shares.hpp"
#include "engine/monitor.hpp"
#include "engine/partial.hpp"
#include "mpi/communicator.hpp"
#include "mpi/protocol.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// Takes partials from the pipeline's threads, or finished rows, and offers each to the rank that
/// merges its query chunk, which asks for them when it has room. A buffer is free again when what
/// is in it has been sent.
class PartialSender : public PartialReceiver {
 public:
  using SoFar = std::function<RunSoFar()>;

  /// `memory` holds the plan's state buffers, or output buffers where it computes by groups. The
  /// ranks 0 to `mergers` merge. `so_far` is what the master is told with each computed subproblem;
  /// the pipeline's threads call it.
  PartialSender(const Plan& plan, int mergers, std::byte* memory, Communicator& communicator,
                Abort& abort, SoFar so_far);

  /// From now on the partials of this subproblem are those of the order numbered `order`.
  void ordered(std::int64_t subproblem, std::int64_t order);
  /// None of them comes after all.
  void left_out(std::int64_t subproblem);

  // For the pipeline's threads.
  bool try_buffer(Buffer& buffer) override;
  Buffer wait_buffer() override;
  void deliver(const Partial& partial) override;
  void end_of_subproblem(std::int64_t id) override;
  bool try_output_buffer(Buffer& buffer) override { return try_buffer(buffer); }
  Buffer wait_output_buffer() override { return wait_buffer(); }
  /// The last piece of a head group ends it as end_of_subproblem() does a subproblem.
  void deliver_finished(const FinishedRows& rows) override;

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
    int to = 0;  ///< rank
    Message message;
    std::int64_t bytes = 0;  ///< in the buffer, of an offer
  };
  /// A subproblem that is computed.
  struct Order {
    std::int64_t number = 0;
    std::map<int, std::int64_t> offered;  ///< partials, by the rank that they are for
    std::int64_t offered_in_all = 0;
  };
  std::int64_t offer(Message message, std::int64_t bytes);
  void send_one(const Waiting& waiting);
  std::byte* data_of(std::int32_t buffer) const { return memory_ + buffer * buffer_bytes_; }

  const Plan& plan_;
  const std::int64_t pieces_of_group_;
  std::byte* memory_;
  std::int64_t buffer_bytes_;
  Communicator& communicator_;
  Pool<std::int32_t> buffers_;
  const MergeShares shares_;
  const SoFar so_far_;
  mutable std::mutex mutex_;  // guards waiting_ and orders_
  std::deque<Waiting> waiting_;
  std::map<std::int64_t, Order> orders_;  ///< by subproblem
  // The communication thread's own.
  std::list<Header> headers_;
  std::list<States> states_;
};

}  // namespace stream_cqsa
