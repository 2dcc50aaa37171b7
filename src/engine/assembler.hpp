// The merging side: partials in, finished rows out.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "engine/accumulator_store.hpp"
#include "engine/checkpoint.hpp"
#include "engine/monitor.hpp"
#include "engine/open_pieces.hpp"
#include "engine/partial.hpp"
#include "engine/piece_table.hpp"
#include "engine/use_table.hpp"
#include "stream_cqsa/engine.hpp"

namespace stream_cqsa {

/// Merges partials into accumulators, finishes the pieces that are complete, and writes them: those
/// of the query chunks that the plan gives this rank to merge, see merger_plan(). Rows that were
/// merged and finished on the device are only written.
///
/// The partials of a piece are merged in ascending order of subproblem, whatever the order in which
/// they are delivered: an early one stays in its state buffer until those before it have come. The
/// result's bits therefore depend on the partials alone. Different pieces are merged at once.
///
/// Pieces of head groups that are done before (Plan::groups_done) are not expected, nor, in such a
/// plan, those of query chunks that see no key: these come first in a run, of all groups.
///
/// With accumulators in memory a piece of a later head group is begun only where enough are left
/// for the groups before it; until then its partials wait like early ones. Whoever delivers out of
/// order must leave state buffers for those that are next, see turn_of().
///
/// With a checkpoint (RunOptions) it goes on from what that holds, and adds to it what is merged
/// and finished: at every interval, when asked to, when all is written, and when asked to stop,
/// which then ends the group of threads with Stopped.
class Assembler : public PartialReceiver {
 public:
  /// `memory` is the plan's whole host arena; the part for cache blocks is not used here. Reads the
  /// checkpoint and all that it names, where there is one, and throws as Checkpoint does.
  Assembler(const Plan& plan, const Outputs& outputs, std::byte* memory, const RunOptions& options,
            Telemetry& telemetry, Abort& abort);

  /// Starts the threads that merge and write, and who keeps the checkpoint. They end when every
  /// piece is written.
  void start(Crew& crew);

  /// Says that nothing of the head group of this number, and of those after it, will come: it is
  /// another plan's. Before end_of_partials().
  void leave_from(std::int64_t group);

  /// Share of the scores of the head group of this number, and of those after it, in the query
  /// chunks that this rank merges, that was not merged when this plan began; 1 where there are
  /// none.
  double lacking_from(std::int64_t group) const;

  /// What the telemetry has of this rank's run, with the threads that merge and write.
  RunSoFar so_far() const;

  /// Says that no more partials will come: a piece that is then incomplete is a failure.
  void end_of_partials();

  /// Makes durable what is merged, while merging goes on, and what is finished and written. Any
  /// thread may call it. Does nothing without a checkpoint.
  void checkpoint();

  bool try_buffer(Buffer& buffer) override;
  Buffer wait_buffer() override;
  /// A partial that its piece already has, merged or waiting, is dropped: duplicates are harmless.
  void deliver(const Partial& partial) override;

  /// Where a partial stands that might be delivered: it would be merged at once, wait for others,
  /// or be dropped. Any thread may ask at any time.
  enum class Turn { next, early, past };
  Turn turn_of(const PieceKey& key, std::int64_t subproblem) const;
  /// The same, and where it is `next` the piece's accumulator is kept for it: it must be delivered.
  Turn admit(const PieceKey& key, std::int64_t subproblem);

  /// Gives back a buffer that was not delivered.
  void give_back(std::int32_t buffer);

  /// Grows when something has been merged or finished, or a buffer is free again: after that the
  /// answers of turn_of() and try_buffer() may be others. Any thread may ask at any time.
  std::uint64_t changes() const { return changes_; }

  /// Has `merged(subproblem)` called, by a merge thread, for every partial that has been merged: it
  /// must neither wait nor call back. Before start().
  void on_merged(std::function<void(std::int64_t)> merged) { on_merged_ = std::move(merged); }

  /// Whether nothing of a subproblem is left to merge on this rank. Any thread may ask at any time.
  bool is_merged(std::int64_t subproblem) const;

  /// Whether all of this rank's pieces are written, and in the checkpoint where there is one: then
  /// nothing can be lost any more. Any thread may ask at any time.
  bool is_complete() const;

  /// How many partials every piece has merged, by its number in PieceTable.
  std::vector<std::int32_t> merged_counts() const;

  /// How many pieces of a query chunk lack the partial of a subproblem of their group; none of a
  /// group that is done before.
  std::int64_t lacking_pieces(const SubproblemKey& subproblem, std::int64_t chunk) const;

  /// Whether a piece of (batch, group, chunk) still lacks the partial of `quorum`. Any thread may
  /// ask at any time.
  bool lacks(std::int64_t batch, std::int64_t group, std::int64_t chunk, std::int64_t quorum) const;

  bool try_output_buffer(Buffer& buffer) override;
  Buffer wait_output_buffer() override;
  /// Rows of a piece that has been delivered before are dropped.
  void deliver_finished(const FinishedRows& rows) override;
  /// Whether the piece's rows have been delivered. Any thread may ask at any time.
  bool has_finished(const PieceKey& key) const;
  void give_back_output(std::int32_t buffer);

  /// Valid after the crew has been joined.
  const std::vector<std::uint64_t>& merged_scores() const { return merged_scores_; }
  NonFinite non_finite() const { return non_finite_; }
  std::int64_t scratch_bytes() const { return store_.file_bytes(); }
  const CheckpointTotals& checkpoint_totals() const { return checkpoint_totals_; }
  /// Live scores that are in the checkpoint.
  std::uint64_t durable_scores() const { return checkpoint_ ? checkpoint_->scores() : 0; }

  /// What was found in the checkpoint. Valid from construction on.
  const Resumed& resumed() const { return checkpoint_totals_.resumed; }
  bool is_resumed() const { return resumed().pieces > 0; }

 private:
  /// A piece that a merge thread has, or whose partials came early.
  struct Entry {
    bool busy = false;                      ///< a merge thread has it
    std::map<std::int64_t, Partial> early;  ///< by subproblem
  };
  struct Finished {
    PieceKey key;
    std::int32_t buffer = 0;
    std::int64_t merged = 0;  ///< of the chunk's quorums: all
    std::int64_t scores = 0;  ///< of all heads, merged into it
    NonFinite non_finite;
    bool lacks_lse = false;  ///< m and l are there instead
  };

  bool has(const PieceKey& key, std::int64_t quorum) const;
  std::int32_t partials_of(const PieceKey& key) const;
  Turn turn(const PieceKey& key, std::int64_t quorum) const;
  bool begins(const PieceKey& key) const;
  void begin(const PieceKey& key, Entry& entry);
  bool is_first(const Partial& partial) const;
  void end_piece(const PieceKey& key, bool begun);
  void finish_keyless();
  void merge_chain(Partial partial);
  void merge_one(const Partial& partial, const QuorumList& quorums, std::size_t position);
  void finish(const PieceKey& key, const SoftmaxStates& states,
              const AccumulatorStore::Progress& progress);
  void write_pieces();
  void write_piece(const Finished& finished);
  void end_producer();

  /// Of the head group of this number, and of those after it.
  std::int64_t pieces_with_partials(std::int64_t group) const;
  void resume();
  /// Pieces of the head group of this number, and of those after it, that were finished when this
  /// plan began; of pieces without partials, all where `group` is the first, else none.
  std::int64_t finished_from(std::int64_t group) const;
  bool was_finished(const PieceKey& key) const {
    return !finished_before_.empty() &&
           finished_before_[static_cast<std::size_t>(pieces_.number(key))];
  }
  void keep_checkpoint();
  JournalRecord record_of(const Finished& finished) const;

  std::int64_t subproblem_of(const PieceKey& key, std::int64_t quorum) const;
  std::int32_t& merged(const PieceKey& key) {
    return merged_[static_cast<std::size_t>(pieces_.number(key))];
  }
  std::byte* output_at(std::int32_t buffer) const;
  /// The lse, where one is written, takes the place of m.
  float* lse_at(std::int32_t buffer, const PieceKey& key) const;
  std::int64_t scores_of_heads(const PieceKey& key, std::int64_t scores) const;
  void count_merged(const PieceKey& key, std::int64_t scores);

  const Plan& plan_;
  const Outputs& outputs_;
  std::byte* memory_;
  int merge_threads_;
  int write_threads_;
  Telemetry& telemetry_;
  const CheckpointOptions checkpoint_options_;

  const PieceTable pieces_;

  // Guards uses_, merged_, entries_, open_, admitted_, waiting_, non_finite_, merged_scores_,
  // pieces_left_, producers_, writers_, written_, all_durable_, all_written_.
  mutable Monitor monitor_;
  mutable UseTable uses_;
  std::vector<std::int32_t> merged_;  ///< by piece: of the chunk's quorums, in order
  // When this plan began. Empty without a checkpoint.
  std::vector<bool> finished_before_;           ///< by piece
  std::vector<std::uint64_t> restored_scores_;  ///< by head group, merged
  std::map<PieceKey, Entry> entries_;
  OpenPieces open_;
  std::set<PieceKey> admitted_;  ///< whose first partial is coming and has an accumulator
  std::set<PieceKey> waiting_;   ///< whose first partial has come and waits for an accumulator
  std::vector<std::uint64_t> merged_scores_;
  NonFinite non_finite_;
  std::int64_t pieces_left_ = 0;
  int producers_ = 0;                   ///< threads that may still push into finished_
  int writers_ = 0;                     ///< threads that may still pop from it
  std::vector<JournalRecord> written_;  ///< finished since the last checkpoint
  bool all_durable_ = false;            ///< every piece is in the checkpoint
  bool all_written_ = false;            ///< and nothing more comes

  std::function<void(std::int64_t)> on_merged_;
  std::atomic<std::uint64_t> changes_{0};
  AccumulatorStore store_;
  std::mutex checkpoint_mutex_;  // guards checkpoint_, checkpoint_totals_
  std::optional<Checkpoint> checkpoint_;
  CheckpointTotals checkpoint_totals_;
  Pool<std::int32_t> state_buffers_;
  Pool<std::int32_t> output_buffers_;
  BoundedQueue<Partial> ready_;
  BoundedQueue<Finished> finished_;
};

}  // namespace stream_cqsa
