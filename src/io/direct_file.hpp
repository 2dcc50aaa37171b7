// Files that are read past the page cache.
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

/// How the system reads a file past its page cache.
struct DirectReads {
  /// Of offsets, sizes and memory: a power of 2, at least a page and at most largest_alignment.
  std::size_t alignment = 0;
  /// As pread(): the bytes read, or -1 and errno.
  std::function<ssize_t(std::span<std::byte> into, std::uint64_t offset)> read;

  static constexpr std::size_t largest_alignment = std::size_t{64} << 10;
};

/// Opens `path` for such reads. Throws Error with the reason where its file system has none.
DirectReads open_direct_reads(const std::filesystem::path& path);

/// What files that are read so have in common. Thread-safe.
class DirectBuffers {
 public:
  /// `refused` is called with a line for people, once, when a file cannot be read directly.
  explicit DirectBuffers(std::function<void(const std::string&)> refused)
      : refused_(std::move(refused)), pool_(bytes) {}

  BufferPool& pool() { return pool_; }
  void refuse(const std::string& name, const std::string& reason);

  /// Of a buffer: 2 MiB, and what alignment of its ends and its address may cost.
  static constexpr std::size_t bytes = (std::size_t{2} << 20) + 3 * DirectReads::largest_alignment;

 private:
  std::function<void(const std::string&)> refused_;
  std::once_flag said_;
  BufferPool pool_;
};

/// A file that is read by `reads` through one aligned buffer for each thread that reads, in equal
/// requests of about 2 MiB; where these are refused (EINVAL), from then on as `usual` reads. What
/// lies behind the end of the file is left to `usual`, which says so.
class DirectFile final : public File {
 public:
  /// `name` is for messages.
  DirectFile(std::unique_ptr<File> usual, std::string name, DirectReads reads,
             std::shared_ptr<DirectBuffers> buffers)
      : usual_(std::move(usual)),
        name_(std::move(name)),
        reads_(std::move(reads)),
        buffers_(std::move(buffers)) {}

  std::uint64_t size() override { return usual_->size(); }
  void read_at(std::uint64_t offset, std::span<std::byte> into) override;
  void write_at(std::uint64_t offset, std::span<const std::byte> from) override {
    usual_->write_at(offset, from);
  }
  void resize(std::uint64_t size) override { usual_->resize(size); }
  void sync() override { usual_->sync(); }

 private:
  std::size_t read_some(std::uint64_t offset, std::span<std::byte> into);

  std::unique_ptr<File> usual_;
  std::string name_;
  DirectReads reads_;
  std::shared_ptr<DirectBuffers> buffers_;
  std::atomic<bool> refused_{false};
};

}  // namespace stream_cqsa
