// Messages on their way.
#pragma once

#include <list>

#include "mpi/communicator.hpp"
#include "mpi/protocol.hpp"

namespace stream_cqsa {

/// Keeps each message until it is sent, or its receiver lost.
class Outbox {
 public:
  explicit Outbox(Communicator& communicator) : communicator_(communicator) {}

  void send(int rank, Tag tag, const Message& message) {
    Sending& sending = sends_.emplace_back(Sending{message, {}});
    sending.request = communicator_.send(rank, tag, sending.message.bytes());
  }
  /// Forgets those that are settled.
  void poll() {
    sends_.remove_if([](Sending& sending) { return sending.request.settled(); });
  }
  bool empty() const { return sends_.empty(); }

 private:
  struct Sending {
    Message message;
    Request request;
  };

  Communicator& communicator_;
  std::list<Sending> sends_;
};

}  // namespace stream_cqsa
