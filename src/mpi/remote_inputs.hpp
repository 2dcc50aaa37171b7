// Inputs of a worker that sees no files: it asks the master for their blocks.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "mpi/communicator.hpp"
#include "mpi/protocol.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// Q, K and V at the master, see InputServer. Reader threads read and wait; the communication
/// thread alone sends and receives, straight into the memory that is read into. All receives of a
/// block are there before the master hears of the request, so what it sends never waits for
/// anything but this rank's polling.
///
/// Memory that was read into must stay until idle(), whatever became of the reader.
class RemoteInputs {
 public:
  RemoteInputs(const TensorDesc& query, const TensorDesc& key, const TensorDesc& value,
               Communicator& communicator);
  ~RemoteInputs();
  RemoteInputs(const RemoteInputs&) = delete;
  RemoteInputs& operator=(const RemoteInputs&) = delete;

  /// Their read() throws Error, with the master's reason, for what it cannot read.
  Inputs inputs() const { return {*query_, *key_, *value_}; }

  /// From now on reads end with Aborted, those that wait too. Does not block.
  void cancel();

  // For the communication thread.
  /// Takes a cancel() back, when idle().
  void reopen();
  /// Sends what there is to send. True where anything happened.
  bool poll();
  /// Nothing waits to be sent, and nothing that was asked for is still to come.
  bool idle() const;

 private:
  class Source;
  /// A request and its answer. The reader and the communication thread share it, as the one may
  /// leave before the other is done.
  struct Exchange {
    Message request;
    std::span<std::byte> into;
    Message answer;
    std::list<Request> under_way;
    bool ended = false;  ///< the answer is there, and the rows, if it says so
  };

  void read(SlotTensor tensor, const Block& block, std::span<std::byte> into);
  std::shared_ptr<Exchange> next_waiting();
  void begin(const std::shared_ptr<Exchange>& exchange);
  void end(Exchange& exchange);

  std::unique_ptr<TensorSource> query_, key_, value_;
  Communicator& communicator_;
  mutable std::mutex mutex_;  // guards waiting_, cancelled_ and every Exchange::ended
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Exchange>> waiting_;
  bool cancelled_ = false;
  // The communication thread's own.
  std::vector<std::int32_t> free_numbers_;
  std::list<std::shared_ptr<Exchange>> active_;
};

}  // namespace stream_cqsa
