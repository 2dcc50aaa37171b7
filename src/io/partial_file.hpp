// A file that gets its name only when it is complete.
#pragma once

#include <atomic>
#include <csignal>
#include <filesystem>
#include <memory>
#include <optional>

#include "stream_cqsa/files.hpp"

namespace stream_cqsa {

/// A descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept;
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor();

  int number() const { return number_; }  ///< negative: none

 private:
  int number_;
};

/// The file at `path`, created or as a killed run left it, locked while the descriptor lives.
/// Throws InputError when it is locked by another, is not a regular file (a symbolic link is not
/// followed) or cannot be created.
Descriptor open_locked(const std::filesystem::path& path);

/// The name of a file that must not outlive the process, while this object lives.
class DoomedName {
 public:
  explicit DoomedName(const std::filesystem::path& path);
  DoomedName(const DoomedName&) = delete;
  DoomedName& operator=(const DoomedName&) = delete;
  ~DoomedName() { forget(); }

  /// From now on the file may stay.
  void forget();

 private:
  std::atomic<char*>* place_;  ///< in a table of fixed size; null when that was full
};

/// A file that is there to be locked while this object lives, and is then removed.
class LockFile {
 public:
  /// Throws as open_locked().
  explicit LockFile(const std::filesystem::path& path);
  LockFile(const LockFile&) = delete;
  LockFile& operator=(const LockFile&) = delete;
  ~LockFile();

 private:
  std::filesystem::path path_;
  Descriptor descriptor_;
  DoomedName doomed_;
};

/// While this object lives, remove_doomed_files() in a handler waits, a second at most: for what is
/// between the creation of a file and its DoomedName.
class BeginningFile {
 public:
  BeginningFile();
  BeginningFile(const BeginningFile&) = delete;
  BeginningFile& operator=(const BeginningFile&) = delete;
  ~BeginningFile();

 private:
  sigset_t before_;  ///< signals that this thread had blocked
};

/// Removes the files of all DoomedNames. Async-signal-safe, and for a handler that ends the
/// process.
void remove_doomed_files() noexcept;

/// `path`.partial until commit(); removed if destroyed before, unless it is to be kept. Of several
/// at one path, in one process or in many, only the first that lives can be made: it holds a lock
/// on the file, or on NFS on `path`.partial.lock. remove_doomed_files() removes it too, unless it
/// is to be kept.
class PartialFile {
 public:
  /// Throws InputError when `path`.partial is being written by another, is not a regular file (a
  /// symbolic link is not followed) or cannot be created, and what `open` throws.
  /// With `keep`, what another left there is taken over instead of emptied.
  PartialFile(std::filesystem::path path, const FileOpener& open, bool keep = false);
  PartialFile(const PartialFile&) = delete;
  PartialFile& operator=(const PartialFile&) = delete;
  ~PartialFile();

  File& file() { return *file_; }

  /// Makes what was written durable. May be called beside the use of file(). Throws Error.
  void sync();

  /// Makes the contents durable, then the name. file() is closed after that. Throws Error.
  void commit();

  /// Whether a run left a file at `path`.partial, or at `path`.
  static bool can_publish(const std::filesystem::path& path);
  /// Gives the file that a run left at `path`.partial its name, durably, unless it has it already.
  /// Throws Error when it has neither name.
  static void publish(const std::filesystem::path& path);

 private:
  void remove_partial();

  std::filesystem::path path_;
  std::filesystem::path partial_;
  bool keep_;
  std::optional<BeginningFile> beginning_;
  std::unique_ptr<LockFile> lock_file_;  ///< where the file's own lock is somebody else's
  Descriptor opened_;
  DoomedName doomed_;
  std::unique_ptr<File> file_;
};

}  // namespace stream_cqsa
