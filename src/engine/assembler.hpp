// The merging side: partials in, finished rows out.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "engine/accumulator_store.hpp"
#include "engine/monitor.hpp"
#include "engine/partial.hpp"
#include "engine/piece_table.hpp"
#include "engine/use_table.hpp"
#include "stream_cqsa/engine.hpp"

namespace stream_cqsa {

/// Merges partials into accumulators, finishes the pieces that are complete, and writes them. Rows
/// that were merged and finished on the device are only written.
///
/// The partials of a piece are merged in ascending order of subproblem, whatever the order in which
/// they are delivered: an early one stays in its state buffer until those before it have come. The
/// result's bits therefore depend on the partials alone. Different pieces are merged at once.
///
/// Accumulators in memory suffice when all partials of a head group are delivered before those of
/// the next, in any order within the group. Whoever lets groups overlap further must have as many
/// accumulators as pieces may then be open, or accumulators in a file; state buffers, likewise, for
/// every partial that may come early.
class Assembler : public PartialReceiver {
 public:
  /// `memory` is the plan's whole host arena; the part for cache blocks is not used here.
  Assembler(const Plan& plan, const Outputs& outputs, std::byte* memory, const RunOptions& options,
            Telemetry& telemetry, Abort& abort);

  /// Starts the merge threads and the writer. They end when every piece is written.
  void start(Crew& crew);

  /// Says that no more partials will come: a piece that is then incomplete is a failure.
  void end_of_partials();

  bool try_buffer(Buffer& buffer) override;
  Buffer wait_buffer() override;
  /// A partial that its piece already has, merged or waiting, is dropped: duplicates are harmless.
  void deliver(const Partial& partial) override;

  /// Whether a piece of (batch, group, chunk) still lacks the partial of `quorum`. Any thread may
  /// ask at any time.
  bool lacks(std::int64_t batch, std::int64_t group, std::int64_t chunk, std::int64_t quorum) const;

  bool try_output_buffer(Buffer& buffer) override;
  Buffer wait_output_buffer() override;
  void deliver_finished(const FinishedRows& rows) override;

  /// Valid after the crew has been joined.
  const std::vector<std::uint64_t>& merged_scores() const { return merged_scores_; }
  NonFinite non_finite() const { return non_finite_; }
  std::int64_t scratch_bytes() const { return store_.file_bytes(); }

 private:
  /// A piece that a merge thread has, or whose partials came early.
  struct Entry {
    bool busy = false;                      ///< a merge thread has it
    std::map<std::int64_t, Partial> early;  ///< by subproblem
  };
  struct Finished {
    PieceKey key;
    std::int32_t buffer = 0;
  };

  bool has(const PieceKey& key, std::int64_t quorum) const;
  void finish_keyless();
  void merge_chain(Partial partial);
  void merge_one(const Partial& partial, const std::vector<std::int32_t>& quorums,
                 std::size_t position);
  void finish(const PieceKey& key, const SoftmaxStates& states);
  void write_pieces();
  void write_piece(const Finished& finished);
  void end_producer();
  std::int64_t subproblem_of(const PieceKey& key, std::int64_t quorum) const;
  std::int32_t& merged(const PieceKey& key) {
    return merged_[static_cast<std::size_t>(pieces_.number(key))];
  }
  Block block_of(const PieceKey& key) const;
  std::byte* output_at(std::int32_t buffer) const;
  /// The lse, where one is written, takes the place of m.
  float* lse_at(std::int32_t buffer, const PieceKey& key) const;
  void count_merged(const PieceKey& key, std::int64_t scores);

  const Plan& plan_;
  const Outputs& outputs_;
  std::byte* memory_;
  int merge_threads_;
  Telemetry& telemetry_;

  const PieceTable pieces_;

  // Guards uses_, merged_, entries_, non_finite_, merged_scores_, producers_.
  mutable Monitor monitor_;
  mutable UseTable uses_;
  std::vector<std::int32_t> merged_;  ///< by piece: of the chunk's quorums, in order
  std::map<PieceKey, Entry> entries_;
  std::vector<std::uint64_t> merged_scores_;
  NonFinite non_finite_;
  std::int64_t pieces_left_ = 0;
  int producers_ = 0;  ///< threads that may still push into finished_

  AccumulatorStore store_;
  Pool<std::int32_t> state_buffers_;
  Pool<std::int32_t> output_buffers_;
  BoundedQueue<Partial> ready_;
  BoundedQueue<Finished> finished_;
};

}  // namespace stream_cqsa
