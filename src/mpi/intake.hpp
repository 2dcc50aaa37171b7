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
#include "mpi/communicator.hpp"
#include "mpi/protocol.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

/// The partials of one subproblem that one worker computed by one order: the same worker may be
/// given it again later.
struct Source {
  std::int64_t subproblem = 0;
  int rank = 0;
  std::int64_t order = 0;
  friend auto operator<=>(const Source&, const Source&) = default;
};

/// Keeps the offers of partials, oldest subproblem first, and has the states sent of those that the
/// assembler has a use and room for: the next one of its piece, and early ones of subproblems
/// within a window of the oldest that this rank has not merged. There is room for all of these,
/// whatever other ranks have merged. One that nobody needs is received as well, since its worker
/// waits for its buffer, and dropped. Finished rows wait for nothing but room. Used by the
/// communication thread alone.
class Intake {
 public:
  /// Called when all partials of a source have come to this rank.
  using Received = std::function<void(const Source&)>;

  Intake(const Plan& plan, Assembler& assembler, Communicator& communicator, Telemetry& telemetry,
         Received received);

  /// The subproblems whose partials all find room here while those before are not merged.
  std::int64_t window() const { return window_; }

  void offer(int rank, const Message& message);
  /// All `count` partials of a subproblem were offered.
  void computed(int rank, const Message& message);

  /// From now on the partials of this source are dropped.
  void drop(const Source& source);
  /// From now on all are.
  void drop_all() {
    dropping_ = true;
    changed_ = true;
  }
  /// The rank is lost, with what it offered: transfers from it are given up, their buffers freed as
  /// soon as MPI lets go of them. There must be no offers of this rank after that.
  void forget(int rank);

  /// Something has been merged.
  void merged();

  /// Moves transfers on and begins new ones. True where anything happened.
  bool poll();
  bool under_way() const { return !transfers_.empty(); }

  /// Seconds in which something that could have been taken in waited for a free buffer: merging or
  /// writing was slower than the workers.
  double stalled_seconds() const { return stalled_; }

 private:
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
    std::int64_t bytes = 0;
    bool forgotten = false;  ///< its rank is lost
  };
  /// How many of a subproblem's partials have come from a rank.
  struct Count {
    std::int64_t came = 0;
    std::int64_t of = -1;  ///< -1: not known yet
  };

  bool move_transfers();
  bool begin_transfers();
  bool begin(const Source& source, const Offer& offer);
  bool wait_for_room();
  bool begin_finished(const Source& source, const Message& message);
  bool receive_dropped(const Source& source, const Message& message);
  void begin_transfer(const Source& source, const Message& message, PartialReceiver::Buffer buffer,
                      bool dropped);
  void end(Transfer& transfer);
  void deliver(const Message& message, PartialReceiver::Buffer buffer);
  void give_back(std::int32_t buffer);
  void give_up(const Transfer& transfer);
  void count(const Source& source, std::int64_t came, std::int64_t of);

  const Plan& plan_;
  Assembler& assembler_;
  Communicator& communicator_;
  Telemetry& telemetry_;
  Received received_;
  std::int64_t window_;
  std::int64_t oldest_ = 0;  ///< smallest subproblem that is not merged here
  /// Those that are dropped go here, one at a time: the others may not give a buffer back.
  PartialReceiver::Buffer spare_;
  bool spare_in_use_ = false;
  bool dropping_ = false;
  std::multimap<Source, Offer> offers_;
  bool changed_ = false;       ///< here, since all offers were last looked at
  std::uint64_t changes_ = 0;  ///< Assembler::changes() when they were
  std::set<Source> dropped_;
  std::list<Transfer> transfers_;
  double busy_since_ = 0;     ///< while there are transfers
  bool no_room_ = false;      ///< as the last poll() found
  double stalled_since_ = 0;  ///< while there is no room
  double stalled_ = 0;
  std::int64_t bytes_under_way_ = 0;
  std::set<std::pair<PieceKey, std::int64_t>> coming_;  ///< (piece, subproblem) of transfers
  std::map<Source, Count> counts_;
};

}  // namespace stream_cqsa
