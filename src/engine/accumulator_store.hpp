// The accumulators of the open query chunks: in memory as far as the plan allows, else in a file.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "engine/journal.hpp"
#include "engine/monitor.hpp"
#include "engine/partial.hpp"
#include "engine/state_file.hpp"
#include "stream_cqsa/engine.hpp"

namespace stream_cqsa {

/// Holds the softmax states of open pieces in the plan's accumulator memory. When a piece has to be
/// opened and there is no room, the one whose next merge is farthest goes to the file: the scratch
/// file, or the state file of the checkpoint, which holds what is durable too.
///
/// A piece is opened and closed by one thread at a time; several threads may have different pieces
/// open. At most as many pieces may be open at once as the plan has accumulators in memory.
class AccumulatorStore {
 public:
  /// `memory` holds plan.host.accumulators of plan.host.accumulator_bytes each. Where the plan has
  /// accumulators in a file, or there is a checkpoint, the file is opened at once, so that a
  /// directory that cannot be written is found before the work.
  AccumulatorStore(const Plan& plan, std::byte* memory, const RunOptions& options,
                   Telemetry& telemetry, Abort& abort);

  /// What is merged into a piece.
  struct Progress {
    std::int64_t merged = 0;  ///< of the chunk's quorums
    std::int64_t scores = 0;  ///< of all heads of the group
  };
  struct Opened {
    SoftmaxStates states;
    Progress progress;  ///< nothing merged yet: the memory is not initialised
  };
  Opened open(const PieceKey& key, std::int64_t subproblem);

  /// Keeps the piece, which subproblem `next_merge` will need next.
  void close(const PieceKey& key, const Progress& progress, std::int64_t next_merge);

  /// Drops the piece, which is finished.
  void remove(const PieceKey& key);

  // --- with a checkpoint ---

  StateFile& file() { return *file_; }

  /// Takes over the states that these records name. Before the first open().
  void restore(std::span<const JournalRecord> records);

  /// Writes every piece that has changed since it was last recorded, while others are merged. The
  /// slots named by the records returned keep what they hold until they are given to release().
  std::vector<JournalRecord> record_changes();

  /// These slots are named by records no longer.
  void release(std::span<const std::int64_t> slots);

  /// The largest size that the file had.
  std::int64_t file_bytes() const { return file_ ? file_->bytes() : 0; }

 private:
  struct Entry {
    Progress progress;
    std::int32_t slot = -1;       ///< in memory, or -1
    std::int64_t next_merge = 0;  ///< subproblem id
    bool busy = false;            ///< open, or on its way to or from the file
    std::int64_t recorded = -1;   ///< `merged` of the newest record
    // In the file, once it has been there: perhaps an older version.
    std::int64_t file_slot = -1;
    std::int64_t file_merged = -1;
    std::uint64_t file_checksum = 0;
  };
  std::int32_t take_slot(Monitor::Lock& lock);
  void write(Monitor::Lock& lock, const PieceKey& key, Entry& entry);
  void read(Monitor::Lock& lock, const PieceKey& key, Entry& entry, std::int32_t slot);
  bool record_change(Monitor::Lock& lock, const PieceKey& key, JournalRecord& record);
  std::span<std::byte> data_of(const PieceKey& key, std::int32_t slot) const;

  const Plan& plan_;
  std::byte* memory_;
  Telemetry& telemetry_;
  Monitor monitor_;
  std::map<PieceKey, Entry> entries_;
  // In memory and idle, by next merge: the last one is the first to go.
  std::set<std::pair<std::int64_t, PieceKey>> idle_;
  std::vector<std::int32_t> free_slots_;
  std::optional<StateFile> file_;
};

}  // namespace stream_cqsa
