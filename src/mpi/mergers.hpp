// What the master knows of the other ranks that merge.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/merge_shares.hpp"
#include "engine/piece_table.hpp"
#include "engine/use_table.hpp"
#include "mpi/communicator.hpp"
#include "mpi/protocol.hpp"
#include "stream_cqsa/checkpoint.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// Keeps what the mergers say: what they had at the start, whether they have written their rows and
/// have ended, and why one failed. Used by the communication thread alone.
class Mergers {
 public:
  Mergers(const Plan& plan, const MergeShares& shares, Communicator& communicator);

  int count() const { return shares_.ranks() - 1; }

  /// `ready`, `written`, `failed` or `ended` of a merger.
  void hear(int rank, const Message& message);
  /// Takes in what mergers have sent of their starts. True where anything came.
  bool poll();

  /// All have said what they had at the start.
  bool are_ready() const { return ready_ == count(); }
  /// The smallest of their windows, and `own`.
  std::int64_t window(std::int64_t own) const;
  /// What they found in their checkpoints, and `own`.
  Resumed resumed(Resumed own) const;
  /// How many pieces of a query chunk that a merger merges lacked the partial of a subproblem at
  /// the start; none of a group that is done before.
  std::int64_t lacking_pieces(const SubproblemKey& subproblem, std::int64_t chunk);

  bool under_way() const { return !coming_.empty(); }
  /// All of their rows: no end of the run costs anything of theirs.
  bool have_written() const { return written_ == count(); }
  bool have_ended() const { return ended_ == count(); }
  /// Scores in their checkpoints, once they have ended.
  std::uint64_t durable_scores() const { return durable_scores_; }

  bool failed() const { return !failure_.empty(); }
  /// Throws why the first one failed, naming its rank.
  void rethrow_if_failed() const;

 private:
  struct Start {
    std::vector<std::byte> bytes;
    Request request;
    MergerStart start;
    std::vector<std::int32_t> merged;  ///< by piece of the share; empty: nothing
  };
  void read(Start& start) const;

  const Plan& plan_;
  const MergeShares& shares_;
  Communicator& communicator_;
  std::optional<UseTable> uses_;  ///< once it is needed
  std::map<int, Start> starts_;   ///< by rank
  std::list<int> coming_;         ///< ranks whose start is on its way
  std::map<int, PieceTable> pieces_;
  int ready_ = 0;
  int written_ = 0;
  int ended_ = 0;
  std::uint64_t durable_scores_ = 0;
  std::string failure_;
  bool bad_input_ = false;
};

}  // namespace stream_cqsa
