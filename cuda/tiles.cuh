// How blocks find their query tile, and walk through the key tiles of its work list.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/attention.hpp"
#include "cuda/score_policy.cuh"

namespace stream_cqsa::cuda {

/// Calls `use` with the padded head dimension as a type: the smallest that holds `dim`.
template <class Use>
auto with_padded_dim(std::int64_t dim, Use use) {
  if (dim <= 32) return use(std::integral_constant<int, 32>());
  if (dim <= 64) return use(std::integral_constant<int, 64>());
  if (dim <= 96) return use(std::integral_constant<int, 96>());
  if (dim <= 128) return use(std::integral_constant<int, 128>());
  return use(std::integral_constant<int, 256>());
}

/// What the rounding of a row's maximum m leaves of an exact scale * score - m grows with m. Beyond
/// this the products are rounded too, so that no weight is above 1.
constexpr float huge_score = 0x1p20f;

/// The query tile of a block.
struct QueryTile {
  std::int64_t item;         ///< into AttentionWork::queries
  std::int64_t first_row;    ///< token in the chunk
  std::int64_t first_token;  ///< the same in the sequence, for the mask
  std::int64_t head, kv_head;
};

/// Blocks are numbered head by head, and the tiles of a head from the last to the first: with a
/// causal mask the longest start first.
template <int Queries>
__device__ QueryTile query_tile(const AttentionWork& work, std::int64_t block) {
  const std::int64_t number = work.tiles - 1 - block % work.tiles;
  std::int64_t low = 0;
  std::int64_t high = work.query_count - 1;
  while (low < high) {
    const std::int64_t middle = (low + high + 1) / 2;
    if (work.queries[middle].first_tile <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const QueryItem& chunk = work.queries[low];
  const std::int64_t first_row = (number - chunk.first_tile) * Queries;
  const std::int64_t head = block / work.tiles;
  return {low, first_row, chunk.first_token + first_row, head, head / (work.heads / work.kv_heads)};
}

/// Whether the states are no longer wanted. Threads that ask at different times may be told
/// otherwise: one asks for its block.
__device__ inline bool cancelled(const AttentionWork& work) {
  // Not from the cache of the multiprocessor, which keeps what an earlier block has read.
  return work.cancelled != nullptr && *static_cast<const volatile int*>(work.cancelled) != 0;
}

/// Columns of a key tile, from `begin` to before `end`.
struct KeyColumns {
  int begin, end;

  __device__ bool contain(int column) const { return begin <= column && column < end; }
};

/// The part of `seen` in the `tokens` tokens from `first` on, counted from `first`.
__device__ inline TokenRange clip(TokenRange seen, std::int64_t first, std::int64_t tokens) {
  const auto clamp = [=](std::int64_t position) -> std::int64_t {
    if (position <= first) return 0;
    return position - first < tokens ? position - first : tokens;
  };
  return {clamp(seen.begin), clamp(seen.end)};
}

/// A tile of keys. Tiles are counted from their chunk's first, and fewer than 2^31: their keys lie
/// in the device's memory.
template <int Keys>
struct KeyTile {
  const KeyItem* keys;  ///< this chunk
  int tile = 0;         ///< of the chunk

  /// Keys of the tile that lie in the chunk.
  __device__ int present() const {
    const std::int64_t rest = keys->tokens - first_row();
    return static_cast<int>(rest < Keys ? rest : Keys);
  }

  /// The tile's first key, in the chunk and in the sequence.
  __device__ std::int64_t first_row() const { return std::int64_t{tile} * Keys; }
  __device__ std::int64_t first_key() const { return keys->first_token + first_row(); }

  /// The keys of the tile that a query sees.
  template <class Policy>
  __device__ KeyColumns columns(const Policy& policy, std::int64_t query) const {
    if (!keys->partial) return {0, present()};
    const TokenRange seen = clip(policy.keys_of(query), first_key(), present());
    const std::int64_t past = seen.end < seen.begin ? seen.begin : seen.end;
    return {static_cast<int>(seen.begin), static_cast<int>(past)};
  }
};

/// The key tiles that any row of a query tile sees, in order.
template <int Keys, int Queries, class Policy>
struct KeyWalk : KeyTile<Keys> {
  using KeyTile<Keys>::keys;
  using KeyTile<Keys>::tile;
  int end = 0;                      ///< one past the last tile that is seen
  int whole_begin = 0;              ///< from this tile on every row sees every key,
  int whole_end = 0;                ///< and no longer from this one on
  int left;                         ///< key chunks from this one on
  int last_row = Queries - 1;       ///< of the query tile, inside the query chunk
  const std::int64_t& first_query;  ///< of the query tile; it may lie in shared memory
  const Policy& policy;

  __device__ KeyWalk(const AttentionWork& work, const QueryItem& chunk, const std::int64_t& first,
                     const Policy& mask)
      : KeyTile<Keys>{work.keys + chunk.first_key},
        left(static_cast<int>(chunk.key_count)),
        first_query(first),
        policy(mask) {
    const std::int64_t rows = chunk.first_token + chunk.tokens - first;
    if (rows < Queries) last_row = static_cast<int>(rows) - 1;
    find_chunk();
  }

  KeyWalk(const AttentionWork&, const QueryItem&, std::int64_t&&, const Policy&) = delete;

  __device__ bool done() const { return left == 0; }
  __device__ bool whole() const { return whole_begin <= tile && tile < whole_end; }

  /// Goes to the next tile; whether that is one of another chunk.
  __device__ bool next() {
    if (++tile != end) return false;
    ++keys;
    --left;
    find_chunk();
    return true;
  }

  /// Stops at the first tile that is seen, of this chunk or a later one.
  __device__ void find_chunk() {
    const auto tiles = [](std::int64_t tokens) { return static_cast<int>(tokens / Keys); };
    for (; left > 0; ++keys, --left) {
      TokenRange any{0, keys->tokens};  // that any row sees, and that all rows see
      TokenRange all = any;
      if (keys->partial) {
        const auto seen_by = [&](std::int64_t query) {
          return clip(policy.keys_of(query), keys->first_token, keys->tokens);
        };
        const TokenRange first = seen_by(first_query);
        const TokenRange last = seen_by(query_at(last_row));
        any = {first.begin, last.end};
        all = {last.begin, first.end};
      }
      tile = tiles(any.begin);
      end = tiles(any.end + Keys - 1);
      whole_begin = tiles(all.begin + Keys - 1);
      whole_end = tiles(all.end);
      if (any.begin < any.end) return;
    }
  }

  /// The sequence position of a row of the query tile. Rows beyond the chunk count as its last.
  __device__ std::int64_t query_at(int row) const {
    return first_query + (row < last_row ? row : last_row);
  }

  __device__ KeyColumns columns(std::int64_t query) const {
    return KeyTile<Keys>::columns(policy, query);
  }
};

}  // namespace stream_cqsa::cuda
