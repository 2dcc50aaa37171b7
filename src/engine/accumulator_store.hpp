// The accumulators of the open query chunks: in memory as far as the plan allows, else in a file.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "engine/monitor.hpp"
#include "engine/partial.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/files.hpp"

namespace stream_cqsa {

/// Holds the softmax states of open pieces in the plan's accumulator memory. When a piece has to be
/// opened and there is no room, the one whose next merge is farthest goes to the scratch file.
///
/// A piece is opened and closed by one thread at a time; several threads may have different pieces
/// open. At most as many pieces may be open at once as the plan has accumulators in memory.
class AccumulatorStore {
 public:
  /// `memory` holds plan.host.accumulators of plan.host.accumulator_bytes each. Where the
  /// plan has accumulators in a file, that is created at once, so that a directory that cannot be
  /// written is found before the work, and unlinked, so that it goes with the process.
  AccumulatorStore(const Plan& plan, std::byte* memory, const std::filesystem::path& scratch,
                   Telemetry& telemetry, Abort& abort);

  struct Opened {
    SoftmaxStates states;
    bool fresh = false;  ///< nothing was merged into it yet: the memory is not initialised
  };
  Opened open(const PieceKey& key, std::int64_t subproblem);

  /// Keeps the piece, which subproblem `next_merge` will need next.
  void close(const PieceKey& key, std::int64_t next_merge);

  /// Drops the piece, which is finished.
  void remove(const PieceKey& key);

  /// The largest size that the scratch file had.
  std::int64_t file_bytes() const { return file_slots_ * slot_bytes_; }

 private:
  struct Entry {
    std::int32_t slot = -1;       ///< in memory, or -1
    std::int64_t file_slot = -1;  ///< its place in the file once it has one
    std::int64_t next_merge = 0;  ///< subproblem id
    bool busy = false;            ///< open, or on its way to or from the file
  };
  std::int32_t take_slot(Monitor::Lock& lock);
  void move(Monitor::Lock& lock, const PieceKey& key, Entry& entry, std::int32_t slot, bool out);
  std::byte* data_of(std::int32_t slot) const { return memory_ + slot * slot_bytes_; }

  const Plan& plan_;
  std::byte* memory_;
  std::int64_t slot_bytes_;
  Telemetry& telemetry_;
  Monitor monitor_;
  std::map<PieceKey, Entry> entries_;
  // In memory and idle, by next merge: the last one is the first to go.
  std::set<std::pair<std::int64_t, PieceKey>> idle_;
  std::vector<std::int32_t> free_slots_;
  std::vector<std::int64_t> free_file_slots_;
  std::int64_t file_slots_ = 0;
  std::unique_ptr<File> file_;
};

}  // namespace stream_cqsa
