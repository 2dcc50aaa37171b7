// The CPU's attention kernel: one tile of query rows against the key chunks of its work.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/problem.hpp"

namespace stream_cqsa {

/// How a problem is cut into tiles. The query heads that share a key/value head are rows of one
/// tile: row = (token - first token) * heads + head. Key blocks are cut in the same way for every
/// tile, so results do not depend on who computes which tile.
struct KernelShape {
  /// Inside a partial chunk pair, `mask_tokens` rows together end their key loop on the first
  /// multiple of `mask_keys` above the last key they see. Both count absolute tokens, so the
  /// scores computed do not depend on the division as long as chunks begin on such multiples.
  static constexpr std::int64_t mask_tokens = 128;
  static constexpr std::int64_t mask_keys = 128;
  static constexpr std::int64_t key_block = 512;                ///< keys per matrix product
  static constexpr std::int64_t max_rows = 256;                 ///< rows per matrix product
  static constexpr std::int64_t score_stride = key_block + 16;  ///< off the powers of two

  std::int64_t heads = 1;   ///< query heads of a tile
  std::int64_t tokens = 1;  ///< query tokens of a tile, a power of two; tiles begin on multiples

  explicit KernelShape(const Problem& problem);
};

/// What one thread works in, carved from the arena.
struct KernelScratch {
  float* query;    ///< [max_rows][dim], scaled
  float* acc;      ///< [max_rows][dim]
  float* key;      ///< [key_block][dim], unused when K is stored as fp32
  float* value;    ///< [key_block][dim], likewise
  float* scores;   ///< [max_rows][score_stride]
  float* m;        ///< [max_rows]
  float* l;        ///< [max_rows]
  float* rescale;  ///< [max_rows]

  static std::int64_t bytes(const Problem& problem);
  KernelScratch(std::byte* memory, const Problem& problem);
};

/// One key chunk where it lies.
struct KernelKeys {
  const std::byte* key;    ///< [key][kv head of the group][dim], storage type
  const std::byte* value;  ///< likewise
  Range keys;              ///< token range
  bool partial;            ///< the mask hides some of it
};

/// One tile of query rows and all that it needs.
struct KernelTile {
  const std::byte* query;           ///< [token][query head of the group][dim] of the query chunk
  SoftmaxStates states;             ///< of the query chunk
  Range queries;                    ///< token range of the query chunk
  Range tokens;                     ///< of the tile
  std::int64_t first_head = 0;      ///< query head within the group
  std::int64_t heads = 0;           ///< query heads of the tile
  std::int64_t kv_head = 0;         ///< within the group
  std::int64_t group_heads = 0;     ///< query heads of the group
  std::int64_t group_kv_heads = 0;  ///< key/value heads of the group
  std::vector<KernelKeys>::const_iterator first_key, last_key;

  std::int64_t rows() const { return tokens.size() * heads; }
};

/// Scores that the tile computes, masked ones within its blocks included.
std::int64_t score_count(const Problem& problem, const KernelTile& tile);

/// Computes the tile's softmax states into tile.states. Ends early, within some milliseconds, with
/// no result, once `cancelled` is set.
void compute_tile(const Problem& problem, const KernelTile& tile, const KernelScratch& scratch,
                  const std::atomic<bool>* cancelled = nullptr);

}  // namespace stream_cqsa
