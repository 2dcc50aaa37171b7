// A checkpoint directory: the journal, and what it says of states and finished rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "engine/journal.hpp"
#include "engine/piece_table.hpp"
#include "engine/state_file.hpp"
#include "engine/use_table.hpp"
#include "stream_cqsa/checkpoint.hpp"
#include "stream_cqsa/engine.hpp"

namespace stream_cqsa {

/// Where the rows of a piece belong in the outputs.
Block block_of(const Plan& plan, const PieceKey& key);

/// Bytes of a piece's rows of O.
std::int64_t output_bytes(const Plan& plan, const PieceKey& key);

/// Calls CheckpointOptions::resumed where there is anything to tell.
void tell_resumed(const CheckpointOptions& options, const Resumed& resumed);

/// Reads the journal of an earlier run, checks what it names, and appends to it. A version of a
/// piece is durable when its states, or its finished rows, and then its record are in storage.
class Checkpoint {
 public:
  /// `memory` is the plan's host arena, used as a buffer here. Every record's data is read and
  /// compared with its checksum; what is not sound is left out, for an older version where there is
  /// one. Finished rows that are sound are told to the sinks (TensorSink::restore). The journal is
  /// then written anew with what was found. With CheckpointOptions::same_run it is taken as it is;
  /// throws Error where it is not sound.
  /// Throws InputError when the directory belongs to another run.
  Checkpoint(const Plan& plan, const Outputs& outputs, const CheckpointOptions& options,
             StateFile& states, std::byte* memory);

  /// What is durable: of each piece one version.
  const std::map<PieceKey, JournalRecord>& durable() const { return durable_; }
  const Resumed& resumed() const { return resumed_; }

  /// Makes these versions durable, with the rows of the `finished` ones, which are written to the
  /// sinks. States of pieces that are finished too are left out. Returns the slots of the state
  /// file that no record names any longer. Throws Error when storage fails.
  std::vector<std::int64_t> commit(std::vector<JournalRecord> states,
                                   std::span<const JournalRecord> finished);

  /// Live scores that are durable.
  std::uint64_t scores() const;

  std::int64_t journal_bytes() const { return journal_.bytes_written(); }

 private:
  void restore(std::byte* memory, bool same_run);
  bool is_sound(const JournalRecord& record, std::byte* memory);
  bool has_states(const JournalRecord& record, std::byte* memory);
  bool has_rows(const JournalRecord& record, std::byte* memory);
  std::vector<JournalRecord> all() const;

  const Plan& plan_;
  const Outputs& outputs_;
  StateFile& states_;
  PieceTable pieces_;
  UseTable uses_;
  Journal journal_;
  std::map<PieceKey, JournalRecord> durable_;
  Resumed resumed_;
};

}  // namespace stream_cqsa
