// Blocks of a bshd tensor in a file that have only some of its heads.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "io/stored_vectors.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// Writes blocks of a bshd tensor, from several threads at once, and reads them.
///
/// The tokens are cut into tiles whose rows fill a buffer of the pool. In place, the token rows of
/// a block with some heads are read, changed and written back: once for every head group. Staged,
/// the vectors of a tile lie as [head][token], so that those of a head group are a few long runs;
/// when the last of a tile come, the whole is put into rows. Example: 2 heads, 7 tokens, tiles of
/// 3,
///
///     staged  h0t0 h0t1 h0t2 h1t0 h1t1 h1t2 | h0t3 h0t4 h0t5 h1t3 h1t4 h1t5 | h0t6 h1t6
///     rows    h0t0 h1t0 h0t1 h1t1 h0t2 h1t2 | h0t3 h1t3 h0t4 h1t4 h0t5 h1t5 | h0t6 h1t6
///
/// A thread that writes has one tile at a time for itself, and at most two buffers.
class TokenRows {
 public:
  /// `vectors` are those of `desc`; with `staged` all of them are zero yet.
  TokenRows(const TensorDesc& desc, const StoredVectors& vectors, BufferPool& buffers, bool staged);

  /// As TensorSink's.
  void write(const Block& block, std::span<const std::byte> from);
  void read(const Block& block, std::span<std::byte> into);

  /// Puts all that is staged into rows. Not beside write().
  void finish();

 private:
  /// Consecutive tokens of one batch entry.
  struct Tile {
    std::size_t number = 0;
    std::int64_t batch = 0;
    Range tokens;
  };

  template <typename Visit>
  void for_each_tile(const Block& block, const Visit& visit);
  Tile tile_of(std::int64_t batch, std::int64_t token) const;
  HeadMajor staged_order(const Tile& tile) const;
  std::size_t row_bytes(Range heads) const;

  void write_part(const Tile& tile, const Block& part, std::span<const std::byte> from);
  void write_rows(const Block& part, std::span<const std::byte> from);
  void write_by_token(const Block& part, std::span<const std::byte> from);
  void overlay(const Block& part, std::span<const std::byte> from);
  void put_into_rows(const Tile& tile, const Block& part, std::span<const std::byte> from);
  void read_rows(const Block& part, std::span<std::byte> into);

  const TensorDesc desc_;
  const StoredVectors vectors_;
  BufferPool& buffers_;
  const std::int64_t tile_tokens_;
  const std::int64_t tiles_per_batch_;
  static constexpr std::int64_t in_rows = -1;
  std::vector<std::int64_t> staged_;       ///< by tile: vectors, or in_rows; empty in place
  std::array<std::mutex, 64> tile_locks_;  ///< a tile's number mod 64; guards its rows, staged_
};

}  // namespace stream_cqsa
