// One launch of attention: every (query chunk, key chunk) pair of a subproblem.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

#include "stream_cqsa/dtype.hpp"

namespace stream_cqsa::cuda {

/// A query chunk in its slot, the state slot that it is computed into, and its key chunks.
struct QueryItem {
  const void* q;             ///< [token][head][dim], storage type
  float* acc;                ///< [token][head][dim]
  float* m;                  ///< [token][head]
  float* l;                  ///< [token][head]
  std::int64_t first_token;  ///< in the sequence, for the mask
  std::int64_t tokens;
  std::int64_t first_tile;  ///< of one head, counted over the query chunks of the launch
  std::int64_t first_key;   ///< into AttentionWork::keys
  std::int64_t key_count;
  std::int64_t slot = 0;  ///< in AttentionWork::query_pool
};

/// A key chunk in its slot.
struct KeyItem {
  const void* k;             ///< [token][key/value head][dim], storage type
  const void* v;             ///< the same
  std::int64_t first_token;  ///< in the sequence, for the mask
  std::int64_t tokens;
  std::int64_t partial;   ///< 0: the mask keeps every score
  std::int64_t slot = 0;  ///< in AttentionWork::key_pool
};

/// The Hopper kernel's tensor copies count the tokens of a slot in 32 bits: longer chunks are the
/// portable kernel's.
constexpr std::int64_t most_pool_tokens = (std::int64_t{1} << 31) - 1;

/// Slots of equal size, one after another.
struct SlotPool {
  void* base = nullptr;
  std::int64_t slots = 0;
  std::int64_t slot_bytes = 0;
  std::int64_t tokens = 0;  ///< of the longest chunk
};

/// What a launch computes. The arrays lie in device memory; 64-bit sizes throughout.
struct AttentionWork {
  const QueryItem* queries;
  const KeyItem* keys;
  std::int64_t query_count;
  std::int64_t tiles;     ///< query tiles of one head, over all query chunks
  std::int64_t heads;     ///< query heads of the group
  std::int64_t kv_heads;  ///< key/value heads of the group
  std::int64_t dim;
  float scale_log2;           ///< scale * log2(e): scores are in base 2
  std::int64_t causal_shift;  ///< query token i sees key tokens j <= i + causal_shift, if partial
  /// A number in device memory, or none: once it is not 0, no block begins a query tile, and the
  /// states are not wanted.
  const int* cancelled = nullptr;

  // For the Hopper kernel, where the slots lie in pools; without, the portable one computes.
  SlotPool query_pool = {};  ///< of Q
  SlotPool key_pool = {};    ///< of K, and V half a slot further
  /// `queries` again, counted in the portable kernel's tiles, and those tiles: that kernel takes
  /// over where V holds NaN or infinity in a pair that the mask cuts.
  const QueryItem* portable_queries = nullptr;
  std::int64_t portable_tiles = 0;
  std::int64_t key_count = 0;    ///< of `keys`
  std::int64_t any_partial = 0;  ///< of `keys`
  int* non_finite = nullptr;     ///< a number in device memory, for this launch's own use
};

/// The tokens of a block's query tile, in which QueryItem::first_tile counts, and of a key tile.
struct AttentionTile {
  std::int64_t queries;
  std::int64_t keys;
};
/// Of the kernel that launch_attention() takes, on the current device, for slots in pools.
AttentionTile attention_tile(DType storage, std::int64_t dim);
/// The name of that kernel.
std::string_view attention_kernel(DType storage, std::int64_t dim);
/// Of the kernel that every device has.
AttentionTile portable_attention_tile(DType storage, std::int64_t dim);

/// Launches the kernel for the storage type (f16, bf16, f32) and dim (a multiple of 8 up to 256).
/// Every row of every query chunk's state is written. Throws CudaError when the launch fails.
void launch_attention(DType storage, const AttentionWork& work, cudaStream_t stream);

}  // namespace stream_cqsa::cuda
