// The journal of a checkpoint: which version of each piece is durable, and where.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

#include "engine/partial.hpp"
#include "stream_cqsa/files.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa {

/// What is durable of one piece.
struct JournalRecord {
  enum class Kind : std::uint64_t {
    state = 1,     ///< softmax states, in a slot of the state file
    finished = 2,  ///< rows of O (and lse), in the outputs
  };
  Kind kind = Kind::state;
  PieceKey key;
  std::int64_t merged = 0;  ///< of the chunk's quorums: the first ones, in canonical order
  std::int64_t scores = 0;  ///< live scores of all heads of the group that are merged
  std::int64_t slot = -1;   ///< in the state file; -1 for finished rows
  std::uint64_t data = 0;   ///< checksum of the states, or of the rows of O, see data_seed()
  std::uint64_t lse = 0;    ///< checksum of the lse rows, where there are any
  NonFinite non_finite;     ///< in the finished rows of O

  friend bool operator==(const JournalRecord&, const JournalRecord&) = default;
};

/// The seed of a record's checksums of data: of another piece or version, data never passes.
std::uint64_t data_seed(const PieceKey& key, std::int64_t merged);

/// An append-only file of records, each 104 bytes of little-endian 64-bit words with a checksum,
/// behind a header of 32 bytes that names the format and the run.
class Journal {
 public:
  /// Opens the journal at `path`, or makes one, and reads it: records() are those before the first
  /// that is torn or damaged, where the file is cut. `identity` tells runs apart.
  /// Throws InputError when the journal is of another run, Error when storage fails.
  Journal(std::filesystem::path path, std::uint64_t identity);

  /// As read when opened, oldest first.
  const std::vector<JournalRecord>& records() const { return records_; }
  /// What was cut off when it was opened; a torn record counts as one.
  std::int64_t dropped_bytes() const { return dropped_bytes_; }
  std::int64_t dropped_records() const;
  /// The journal was there, and its header was not sound: its records, which bear the run's
  /// identity too, are read all the same.
  bool damaged_header() const { return damaged_header_; }

  /// Records in the file now.
  std::int64_t count() const { return count_; }
  /// By append() and replace(), in all.
  std::int64_t bytes_written() const { return bytes_written_; }

  /// Durable when it returns.
  void append(std::span<const JournalRecord> records);

  /// Replaces the whole journal at once, durably: at any moment the file holds what it held, or
  /// `records`.
  void replace(std::span<const JournalRecord> records);

  /// Gives back the memory of records().
  void forget() { records_ = {}; }

 private:
  void read();
  void write_new(std::span<const JournalRecord> records);

  std::filesystem::path path_;
  std::uint64_t identity_;
  std::unique_ptr<File> file_;
  std::vector<JournalRecord> records_;
  std::int64_t count_ = 0;
  std::int64_t dropped_bytes_ = 0;
  std::int64_t bytes_written_ = 0;
  bool damaged_header_ = false;
};

}  // namespace stream_cqsa
