// Partials of the workers on their way into the assembler.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "engine/assembler.hpp"
#include "engine/dispatcher.hpp"
#include "mpi/communicator.hpp"
#include "mpi/protocol.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

/// Keeps the offers of partials, oldest subproblem first, and has the states sent of those that the
/// assembler has a use and room for: the next one of its piece, and early ones of subproblems
/// within the dispatcher's window. One that nobody needs is received as well, since its worker
/// waits for its buffer, and dropped. Used by the communication thread alone.
class Intake {
 public:
  Intake(const Plan& plan, Assembler& assembler, Dispatcher& dispatcher, Communicator& communicator,
         Telemetry& telemetry)
      : plan_(plan),
        assembler_(assembler),
        dispatcher_(dispatcher),
        communicator_(communicator),
        telemetry_(telemetry),
        spare_(assembler.wait_buffer()) {}

  void offer(int rank, const Message& message);
  /// All `count` partials of a subproblem were offered.
  void computed(int rank, std::int64_t subproblem, std::int64_t count);

  /// From now on the partials of these subproblems of `rank` are dropped.
  void drop(int rank, const std::vector<std::int64_t>& subproblems);
  /// From now on all are.
  void drop_all() { dropping_ = true; }
  /// The rank is lost, with what it offered: transfers from it are given up, their buffers freed as
  /// soon as MPI lets go of them. There must be no offers of this rank after that.
  void forget(int rank);

  /// Moves transfers on and begins new ones. True where anything happened.
  bool poll();
  bool under_way() const { return !transfers_.empty(); }

 private:
  struct Source {
    std::int64_t subproblem = 0;
    int rank = 0;
    friend auto operator<=>(const Source&, const Source&) = default;
  };
  struct Offer {
    Message message;
    bool dropped = false;
  };
  struct Transfer {
    Request request;
    Source source;
    Message message;
    bool dropped = false;
    PartialReceiver::Buffer buffer;
    SoftmaxStates states;
    bool forgotten = false;  ///< its rank is lost
  };
  /// How many of a subproblem's partials have come from a rank.
  struct Count {
    std::int64_t came = 0;
    std::int64_t of = -1;  ///< -1: not known yet
  };

  bool begin(const Source& source, const Offer& offer);
  bool drop(const Source& source, const Message& message);
  void begin_transfer(const Source& source, const Message& message, PartialReceiver::Buffer buffer,
                      bool dropped);
  void end(Transfer& transfer);
  void give_up(const Transfer& transfer);
  void count(const Source& source, std::int64_t came, std::int64_t of);

  const Plan& plan_;
  Assembler& assembler_;
  Dispatcher& dispatcher_;
  Communicator& communicator_;
  Telemetry& telemetry_;
  /// Those that are dropped go here, one at a time: the others may not give a buffer back.
  PartialReceiver::Buffer spare_;
  bool spare_in_use_ = false;
  bool dropping_ = false;
  std::multimap<Source, Offer> offers_;
  std::set<Source> dropped_;
  std::list<Transfer> transfers_;
  double busy_since_ = 0;  ///< while there are transfers
  std::int64_t bytes_under_way_ = 0;
  std::set<std::pair<PieceKey, std::int64_t>> coming_;  ///< (piece, subproblem) of transfers
  std::map<Source, Count> counts_;
};

}  // namespace stream_cqsa
