// Softmax states in a file, in slots of equal size.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

#include "stream_cqsa/files.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa {

/// The slots of the scratch file, or of the state file of a checkpoint. A slot begins at a multiple
/// of state_slot_alignment, and has users: it may be written while it has one, and is free for
/// others when it has none.
///
/// Bookkeeping is for one thread at a time; reading, writing and sync() may go on beside it.
class StateFile {
 public:
  /// A file without a name in `directory`, which goes with the process. Throws Error when the
  /// directory cannot be written.
  static StateFile scratch(const std::filesystem::path& directory, std::int64_t slot_bytes,
                           const FileOpener& open = open_posix_file);

  /// The file at `path`, as it is, or a new one. Throws Error when it cannot be opened.
  static StateFile kept(const std::filesystem::path& path, std::int64_t slot_bytes,
                        const FileOpener& open = open_posix_file);

  /// Whether checksums of what is written are wanted.
  bool is_kept() const { return kept_; }

  /// A free slot, with one user from now on.
  std::int64_t take();

  /// Gives each of these slots of a file that is continued `users` users; before the first take().
  void restore(std::span<const std::int64_t> slots, std::int32_t users);

  /// One more user of a slot that has one.
  void share(std::int64_t slot) { ++users_[static_cast<std::size_t>(slot)]; }

  /// One user less.
  void give(std::int64_t slot);

  /// Whether the slot has other users than the caller.
  bool is_shared(std::int64_t slot) const { return users_[static_cast<std::size_t>(slot)] > 1; }

  void write(std::int64_t slot, std::span<const std::byte> from);
  void read(std::int64_t slot, std::span<std::byte> into);

  /// Whether the file is large enough to hold `bytes` in that slot.
  bool holds(std::int64_t slot, std::int64_t bytes);

  /// Makes what was written durable.
  void sync() { file_->sync(); }

  /// The largest size that was needed.
  std::int64_t bytes() const { return static_cast<std::int64_t>(users_.size()) * slot_bytes_; }

 private:
  StateFile(std::unique_ptr<File> file, std::int64_t slot_bytes, bool kept)
      : file_(std::move(file)), slot_bytes_(state_slot_bytes(slot_bytes)), kept_(kept) {}
  std::uint64_t offset_of(std::int64_t slot) const {
    return static_cast<std::uint64_t>(slot * slot_bytes_);
  }

  std::unique_ptr<File> file_;
  std::int64_t slot_bytes_;
  bool kept_;
  std::vector<std::int32_t> users_;  ///< by slot
  std::vector<std::int64_t> free_;
};

}  // namespace stream_cqsa
