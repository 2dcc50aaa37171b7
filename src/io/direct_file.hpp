// Files that are read and written past the page cache.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>

#include "io/stored_vectors.hpp"
#include "stream_cqsa/files.hpp"

namespace stream_cqsa {

/// How the system reads and writes a file past its page cache.
struct DirectAccess {
  /// Of offsets, sizes and memory: a power of 2, at least a page and at most largest_alignment.
  std::size_t alignment = 0;
  /// As pread(): the bytes read, or -1 and errno.
  std::function<ssize_t(std::span<std::byte> into, std::uint64_t offset)> read;
  /// As pwrite(); none for a file that is only read.
  std::function<ssize_t(std::span<const std::byte> from, std::uint64_t offset)> write;
  /// As fsync(); none for a file that is only read.
  std::function<int()> sync;

  static constexpr std::size_t largest_alignment = std::size_t{64} << 10;
};

/// Opens `path`, which is there, for such access: with FileMode::read to read, else to write, too.
/// Throws Error with the reason where its file system has none.
DirectAccess open_direct_access(const std::filesystem::path& path, FileMode mode);

/// What files with direct access have in common. Thread-safe.
class DirectBuffers {
 public:
  /// `refused` is called with a line for people, once, when a file has no direct access.
  explicit DirectBuffers(std::function<void(const std::string&)> refused)
      : refused_(std::move(refused)), pool_(bytes) {}

  BufferPool& pool() { return pool_; }
  void refuse(const std::string& name, const std::string& reason);

  /// Of a buffer: 2 MiB, and what alignment of its ends and its address may cost.
  static constexpr std::size_t bytes = (std::size_t{2} << 20) + 3 * DirectAccess::largest_alignment;

 private:
  std::function<void(const std::string&)> refused_;
  std::once_flag said_;
  BufferPool pool_;
};

/// A file that is read, and written where `access` can, through one aligned buffer for each thread
/// that does so, in requests of about 2 MiB; where these are refused (EINVAL), from then on as
/// `usual` does, but for a file that has been written directly: that is a failure. What would be
/// read from behind the end of the file is left to `usual`, which says so. Direct writes must begin
/// at a multiple of the alignment (else std::logic_error), and what lies behind them up to the next
/// is lost.
class DirectFile final : public File {
 public:
  /// `name` is for messages.
  DirectFile(std::unique_ptr<File> usual, std::string name, DirectAccess access,
             std::shared_ptr<DirectBuffers> buffers)
      : usual_(std::move(usual)),
        name_(std::move(name)),
        access_(std::move(access)),
        buffers_(std::move(buffers)) {}

  std::uint64_t size() override { return usual_->size(); }
  void read_at(std::uint64_t offset, std::span<std::byte> into) override;
  void write_at(std::uint64_t offset, std::span<const std::byte> from) override;
  void resize(std::uint64_t size) override { usual_->resize(size); }
  void sync() override;

 private:
  std::size_t read_some(std::uint64_t offset, std::span<std::byte> into);
  std::size_t write_some(std::uint64_t offset, std::span<const std::byte> from);
  std::size_t largest_request() const;
  std::span<std::byte> aligned(std::span<std::byte> buffer, std::size_t bytes) const;
  void refuse_or_fail(const char* what, std::uint64_t offset, int reason);

  std::unique_ptr<File> usual_;
  std::string name_;
  DirectAccess access_;
  std::shared_ptr<DirectBuffers> buffers_;
  std::atomic<bool> refused_{false};
  std::atomic<bool> written_{false};  ///< directly
};

/// Of direct writes, see direct_block_opener(): bytes.
inline constexpr std::size_t direct_block = 4096;

/// Opens files by plain system calls, and reads and writes them as a DirectFile whose alignment is
/// direct_block. Where a file system refuses, they are the usual ones, and `refused` is called with
/// a line for people, once.
FileOpener direct_block_opener(std::function<void(const std::string&)> refused);

}  // namespace stream_cqsa
