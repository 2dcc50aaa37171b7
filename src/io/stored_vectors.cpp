#include "io/stored_vectors.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace stream_cqsa {
namespace {

std::size_t to_size(std::int64_t value) { return static_cast<std::size_t>(value); }

/// Calls visit(first vector in the file, its offset in the packed block, vectors) for runs of one
/// head's tokens that fit a buffer.
template <typename Visit>
void for_each_run(const StoredVectors& vectors, const HeadMajor& stored, Range tokens, Range heads,
                  const BufferPool& buffers, const Visit& visit) {
  const auto longest = static_cast<std::int64_t>(buffers.bytes() / vectors.bytes);
  for (std::int64_t head = heads.begin; head < heads.end; ++head) {
    for (std::int64_t token = tokens.begin; token < tokens.end; token += longest) {
      const std::int64_t vector = (token - tokens.begin) * heads.size() + head - heads.begin;
      visit(stored.first + head * stored.tokens + token, to_size(vector) * vectors.bytes,
            std::min(longest, tokens.end - token));
    }
  }
}

/// Whether a block is a single run, packed in the file as in memory.
bool is_one_run(const HeadMajor& stored, Range heads) {
  return heads.size() == 1 || stored.tokens == 1;
}

}  // namespace

BufferPool::Lease BufferPool::take() {
  {
    const std::scoped_lock lock(mutex_);
    if (!free_.empty()) {
      std::vector<std::byte> buffer = std::move(free_.back());
      free_.pop_back();
      return {*this, std::move(buffer)};
    }
    free_.reserve(free_.capacity() + 1);  // so that this one can come back without fail
  }
  return {*this, std::vector<std::byte>(bytes_)};
}

void BufferPool::give_back(std::vector<std::byte> buffer) noexcept {
  const std::scoped_lock lock(mutex_);
  free_.push_back(std::move(buffer));
}

void copy_strided(std::byte* into, std::size_t into_stride, const std::byte* from,
                  std::size_t from_stride, std::int64_t count, std::size_t bytes) {
  for (; count > 0; --count, into += into_stride, from += from_stride) {
    std::memcpy(into, from, bytes);
  }
}

void write_heads(const StoredVectors& vectors, const HeadMajor& stored, Range tokens, Range heads,
                 std::span<const std::byte> from, BufferPool& buffers) {
  if (is_one_run(stored, heads)) {
    return vectors.write(stored.first + heads.begin * stored.tokens + tokens.begin, from);
  }
  BufferPool::Lease buffer = buffers.take();
  for_each_run(vectors, stored, tokens, heads, buffers,
               [&](std::int64_t first, std::size_t at, std::int64_t count) {
                 const std::span<std::byte> run = buffer.first(to_size(count) * vectors.bytes);
                 copy_strided(run.data(), vectors.bytes, from.data() + at,
                              to_size(heads.size()) * vectors.bytes, count, vectors.bytes);
                 vectors.write(first, run);
               });
}

void read_heads(const StoredVectors& vectors, const HeadMajor& stored, Range tokens, Range heads,
                std::span<std::byte> into, BufferPool& buffers) {
  if (is_one_run(stored, heads)) {
    return vectors.read(stored.first + heads.begin * stored.tokens + tokens.begin, into);
  }
  BufferPool::Lease buffer = buffers.take();
  for_each_run(vectors, stored, tokens, heads, buffers,
               [&](std::int64_t first, std::size_t at, std::int64_t count) {
                 const std::span<std::byte> run = buffer.first(to_size(count) * vectors.bytes);
                 vectors.read(first, run);
                 copy_strided(into.data() + at, to_size(heads.size()) * vectors.bytes, run.data(),
                              vectors.bytes, count, vectors.bytes);
               });
}

}  // namespace stream_cqsa
