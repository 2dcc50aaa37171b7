// Input rows that the master sends to workers that see no files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/monitor.hpp"
#include "mpi/communicator.hpp"
#include "mpi/protocol.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// What an InputServer did.
struct ServedInputs {
  std::int64_t buffers = 0;       ///< 0: inputs were not served
  std::int64_t buffer_bytes = 0;  ///< of each
  std::int64_t blocks = 0;        ///< that were sent
  std::int64_t bytes = 0;         ///< of those
};

/// Answers Said::read. The blocks that are asked for, one of each worker in turn, get a buffer
/// where one is free, are read by threads of its own and sent by the communication thread. An
/// answer is a Message, then the rows in pieces, see for_each_input_piece(); where there are no
/// rows, as many messages come, and they are empty.
///
/// Every request is answered, whatever else has failed. Buffers cannot all be stuck: a worker has
/// asked MPI for the whole answer before it asks the master, and polls until it has come, so that
/// what is being sent waits neither for other blocks nor for partials. Nor do partials wait for
/// reads.
class InputServer {
 public:
  /// `memory` holds the plan's cache blocks: the buffers. Throws InputError for a plan whose inputs
  /// are resident.
  InputServer(const Plan& plan, const Inputs& inputs, std::byte* memory, int read_threads,
              Communicator& communicator);
  ~InputServer();
  InputServer(const InputServer&) = delete;
  InputServer& operator=(const InputServer&) = delete;

  // For the communication thread.
  void request(int rank, const Message& message);
  /// The rank is lost: what it asked for is not read. What is sent to it is dropped.
  void forget(int rank);
  /// From now on nothing is read: requests are answered with Said::too_late.
  void refuse_all() { refusing_ = true; }
  /// Moves answers on. True where anything happened.
  bool poll();
  /// Every request is answered, and every answer has come.
  bool idle() const { return asked_.empty() && reading_ == 0 && sending_.empty(); }
  const ServedInputs& served() const { return served_; }

 private:
  struct Answer {
    int rank = 0;
    Message message;           ///< the request, then the answer
    std::int32_t buffer = -1;  ///< or none
    std::size_t bytes = 0;     ///< of the rows
    std::list<Request> under_way;
  };

  void read_blocks();
  void read(Answer& answer);
  bool take_up();
  std::unique_ptr<Answer> next_asked();
  void send(std::unique_ptr<Answer> answer);
  std::span<std::byte> buffer(std::int32_t number) const {
    return {memory_ + number * served_.buffer_bytes,
            static_cast<std::size_t>(served_.buffer_bytes)};
  }

  Inputs inputs_;
  std::byte* memory_;
  Communicator& communicator_;
  // The communication thread's own.
  ServedInputs served_;
  bool refusing_ = false;
  std::vector<std::int32_t> free_buffers_;
  std::map<int, std::deque<Message>> asked_;  ///< by rank; none is empty
  int last_rank_ = 0;                         ///< whose request was taken up last
  std::int64_t reading_ = 0;
  std::list<std::unique_ptr<Answer>> sending_;
  // Shared with the readers. A failure of the run must not end them, as workers wait for answers.
  Abort abort_;
  BoundedQueue<std::unique_ptr<Answer>> to_read_;
  BoundedQueue<std::unique_ptr<Answer>> was_read_;
  Crew crew_;
};

}  // namespace stream_cqsa
