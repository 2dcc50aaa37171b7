// The vectors of a tensor in a file, and blocks of them that lie head by head.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "stream_cqsa/files.hpp"
#include "stream_cqsa/range.hpp"

namespace stream_cqsa {

/// A tensor's vectors (dim elements each), packed in a file from some offset on.
struct StoredVectors {
  File& file;
  std::uint64_t offset = 0;  ///< of vector 0, bytes
  std::size_t bytes = 0;     ///< of a vector

  void read(std::int64_t first, std::span<std::byte> into) const {
    file.read_at(offset + static_cast<std::uint64_t>(first) * bytes, into);
  }
  void write(std::int64_t first, std::span<const std::byte> from) const {
    file.write_at(offset + static_cast<std::uint64_t>(first) * bytes, from);
  }
};

/// Buffers of one size, as many as are in use at once. Thread-safe.
class BufferPool {
 public:
  explicit BufferPool(std::size_t bytes) : bytes_(bytes) {}

  /// A buffer that goes back to the pool.
  class Lease {
   public:
    Lease(BufferPool& pool, std::vector<std::byte> buffer)
        : pool_(pool), buffer_(std::move(buffer)) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { pool_.give_back(std::move(buffer_)); }
    std::span<std::byte> first(std::size_t bytes) { return std::span(buffer_).first(bytes); }

   private:
    BufferPool& pool_;
    std::vector<std::byte> buffer_;
  };

  std::size_t bytes() const { return bytes_; }  ///< of each
  Lease take();

 private:
  void give_back(std::vector<std::byte> buffer) noexcept;

  std::size_t bytes_;
  std::mutex mutex_;
  std::vector<std::vector<std::byte>> free_;
};

/// Copies `count` pieces of `bytes` bytes, which lie `stride` bytes apart.
void copy_strided(std::byte* into, std::size_t into_stride, const std::byte* from,
                  std::size_t from_stride, std::int64_t count, std::size_t bytes);

/// Vectors stored [head][token] from vector `first` on, `tokens` of each head.
struct HeadMajor {
  std::int64_t first = 0;
  std::int64_t tokens = 0;
};

/// Writes, or reads, the vectors of some tokens and heads, packed in memory as [token][head], in
/// runs of one head's tokens, through a buffer.
void write_heads(const StoredVectors& vectors, const HeadMajor& stored, Range tokens, Range heads,
                 std::span<const std::byte> from, BufferPool& buffers);
void read_heads(const StoredVectors& vectors, const HeadMajor& stored, Range tokens, Range heads,
                std::span<std::byte> into, BufferPool& buffers);

}  // namespace stream_cqsa
