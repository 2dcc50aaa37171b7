// The portable kernel for 16-bit types: tensor cores by mma.sync, from compute capability 8.0 on.
//
// A block computes one query tile of one query head against all key tiles of its query chunk's work
// list, K and V one tile ahead by asynchronous copies. Each warp owns whole query rows.
// Structure as in FlashAttention-2 (arXiv 2307.08691).
#pragma once

#include <cstdint>
#include <limits>

#include "cuda/attention.hpp"
#include "cuda/mma.cuh"
#include "cuda/score_policy.cuh"

namespace stream_cqsa::cuda {

/// Tile sizes for a padded head dimension and the keys of a tile.
template <int D, int Keys>
struct MmaTile {
  static constexpr int warps = 4;
  static constexpr int queries = D <= 128 ? 128 : 64;
  static constexpr int keys = Keys;
  static constexpr bool query_in_registers = D <= 64;
  static constexpr int blocks_per_sm = D <= 128 ? 2 : 1;

  static constexpr int threads = 32 * warps;
  static constexpr int warp_rows = queries / warps;
  static constexpr int row_tiles = warp_rows / 16;
  static constexpr int units = D / 8;                          ///< of 16 bytes in a row
  static constexpr int copy_units = units == 12 ? 16 : units;  ///< threads that copy a row
  static constexpr int copy_rows = threads / copy_units;       ///< rows that are copied at once
  /// A row is padded by 16 bytes: an odd number of units, so that the 8 rows of a matrix that
  /// ldmatrix reads lie in different banks.
  static constexpr int row_bytes = 2 * D + 16;
  static constexpr int query_bytes = queries * row_bytes;
  static constexpr int key_bytes = keys * row_bytes;
  static constexpr int shared_bytes = query_bytes + 4 * key_bytes;  ///< two stages of K and V

  static_assert(D % 32 == 0 && keys % 16 == 0 && warp_rows % 16 == 0);
  static_assert(threads % copy_units == 0 && queries % copy_rows == 0 && keys % copy_rows == 0);
  static_assert(shared_bytes <= 162 * 1024, "must fit compute capability 8.0");
};

/// Where in the work list a block stands: a key tile of a key chunk. Tiles are counted from the
/// chunk's first, and fewer than 2^31: their keys lie in the device's memory.
struct KeyCursor {
  int left;    ///< key chunks after this one
  int tile;    ///< this tile
  int filled;  ///< tiles before this one have all their tokens
  int whole;   ///< tiles before this one need no mask at all
  int end;     ///< one past the last tile that any row of the query tile sees
  const KeyItem* keys;

  __device__ bool done() const { return left < 0; }
};

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

template <class T, int D, int Keys, class Policy>
class MmaAttention {
 public:
  using Tile = MmaTile<D, Keys>;

  __device__ MmaAttention(const AttentionWork& work, const QueryTile& tile, char* shared)
      : work_(work),
        policy_(work),
        tile_(tile),
        key_stride_(2 * work.kv_heads * work.dim),
        copy_row_(static_cast<int>(threadIdx.x) / Tile::copy_units),
        copy_unit_(static_cast<int>(threadIdx.x) % Tile::copy_units),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        shared_(shared),
        q_shared_(shared_address(shared)),
        k_shared_(q_shared_ + Tile::query_bytes) {
#pragma unroll
    for (auto& rows : max_) rows[0] = rows[1] = -HUGE_VALF;
  }

  __device__ void run() {
    const QueryItem& chunk = work_.queries[tile_.item];
    KeyCursor cursor{static_cast<int>(chunk.key_count), 0, 0, 0, 0,
                     work_.keys + chunk.first_key - 1};
    next_chunk(cursor);
    start_query();
    start_tile(cursor, 0);
    finish_query();
    for (int stage = 0; !cursor.done(); stage ^= 1) {
      wait_copies();
      __syncthreads();  // this tile has arrived; everybody is done with the tile before
      const KeyCursor current = cursor;
      next_tile(cursor);
      start_tile(cursor, stage ^ 1);
      add_tile(current, k_shared_ + stage * 2 * Tile::key_bytes);
    }
    write_state();
  }

 private:
  // --- the work list ---

  __device__ void next_chunk(KeyCursor& cursor) {
    const std::int64_t last_query = tile_.first_token + Tile::queries - 1;
    do {
      ++cursor.keys;
      if (--cursor.left < 0) return;
      const KeyItem& keys = *cursor.keys;
      const auto tiles = [](std::int64_t tokens) { return static_cast<int>(tokens / Tile::keys); };
      std::int64_t end = keys.tokens;
      cursor.filled = cursor.whole = tiles(keys.tokens);
      if (keys.partial) {
        end = policy_.visible_end(last_query, keys.first_token, keys.tokens);
        cursor.whole = tiles(policy_.whole_end(tile_.first_token, keys.first_token, keys.tokens));
      }
      cursor.tile = 0;
      cursor.end = tiles(end + Tile::keys - 1);
    } while (cursor.end == 0);
    const std::int64_t offset =
        copy_row_ * key_stride_ + 16 * copy_unit_ + 2 * tile_.kv_head * work_.dim;
    k_from_ = static_cast<const char*>(cursor.keys->k) + offset;
    v_from_ = static_cast<const char*>(cursor.keys->v) + offset;
  }

  __device__ void next_tile(KeyCursor& cursor) {
    if (++cursor.tile == cursor.end) return next_chunk(cursor);
    k_from_ += Tile::keys * key_stride_;
    v_from_ += Tile::keys * key_stride_;
  }

  // --- global to shared memory ---

  /// Copies `Rows` rows, of which this thread does every Tile::copy_rows-th one from its own on, a
  /// unit of 16 bytes each. Rows from `present` on become zeros, and units beyond the head
  /// dimension.
  template <int Rows, bool Filled>
  __device__ void start_rows(std::uint32_t to, const char* from, std::int64_t stride,
                             std::int64_t present) const {
    if (Tile::copy_units > Tile::units && copy_unit_ >= Tile::units) return;
    const int bytes = copy_unit_ < work_.dim / 8 ? 16 : 0;
    to += copy_row_ * Tile::row_bytes + 16 * copy_unit_;
#pragma unroll
    for (int row = 0; row < Rows; row += Tile::copy_rows) {
      const bool copied = Filled || copy_row_ + row < present;
      copy_async(to + row * Tile::row_bytes, copied ? from + row * stride : from,
                 copied ? bytes : 0);
    }
  }

  __device__ void start_query() const {
    const QueryItem& chunk = work_.queries[tile_.item];
    const std::int64_t stride = 2 * work_.heads * work_.dim;
    const auto* from =
        static_cast<const char*>(chunk.q) + tile_.first_row * stride + 2 * tile_.head * work_.dim;
    start_rows<Tile::queries, false>(q_shared_, from + copy_row_ * stride + 16 * copy_unit_, stride,
                                     chunk.tokens - tile_.first_row);
  }

  __device__ void start_tile(const KeyCursor& cursor, int stage) const {
    if (cursor.done()) return;
    const std::uint32_t k = k_shared_ + stage * 2 * Tile::key_bytes;
    const std::uint32_t v = k + Tile::key_bytes;
    if (cursor.tile < cursor.filled) {
      start_rows<Tile::keys, true>(k, k_from_, key_stride_, 0);
      start_rows<Tile::keys, true>(v, v_from_, key_stride_, 0);
    } else {
      const std::int64_t present = cursor.keys->tokens - std::int64_t{cursor.tile} * Tile::keys;
      start_rows<Tile::keys, false>(k, k_from_, key_stride_, present);
      start_rows<Tile::keys, false>(v, v_from_, key_stride_, present);
    }
  }

  /// Q has arrived: with a scale that is not positive, its sign goes into Q, since the maximum is
  /// taken before scaling.
  __device__ void finish_query() {
    scale_ = fabsf(work_.scale_log2);
    if (!Tile::query_in_registers && work_.scale_log2 > 0) return;
    wait_copies();
    __syncthreads();
    if (!(work_.scale_log2 > 0)) {
      apply_sign();
      __syncthreads();
    }
    if constexpr (Tile::query_in_registers) {
#pragma unroll
      for (int tile = 0; tile < Tile::row_tiles; ++tile) {
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
          load_matrices(query_[tile][step], query_address(tile, step));
        }
      }
    }
  }

  __device__ void apply_sign() {
    auto* elements = reinterpret_cast<unsigned short*>(shared_);
    const bool zero = work_.scale_log2 == 0;
    if (zero) scale_ = 1;
    for (int at = threadIdx.x; at < Tile::query_bytes / 2; at += Tile::threads) {
      const std::uint32_t bits = elements[at];
      const bool finite = (bits & Format<T>::exponent) != Format<T>::exponent;
      const std::uint32_t zeroed = finite ? 0 : Format<T>::nan;
      elements[at] = static_cast<unsigned short>(zero ? zeroed : bits ^ 0x8000u);
    }
  }

  // --- one key tile ---

  __device__ void add_tile(const KeyCursor& cursor, std::uint32_t k_shared) {
    float scores[Tile::row_tiles][Tile::keys / 8][4];
    multiply_query_key(scores, k_shared);
    const bool whole = cursor.tile < cursor.whole;
    if (!whole) mask(scores, cursor);
    softmax(scores);
    if (!whole) reveal_non_finite(cursor, k_shared - q_shared_ + Tile::key_bytes);
    multiply_probability_value(scores, k_shared + Tile::key_bytes);
  }

  // --- products ---

  __device__ std::uint32_t query_address(int tile, int step) const {
    const int row = warp_ * Tile::warp_rows + tile * 16 + lane_ % 16;
    return q_shared_ + row * Tile::row_bytes + step * 32 + lane_ / 16 * 16;
  }

  /// scores = Q K^T. A thread holds the rows lane / 4 and lane / 4 + 8 of each 16, and the columns
  /// 2 (lane % 4) and the next of each 8.
  __device__ void multiply_query_key(float (&scores)[Tile::row_tiles][Tile::keys / 8][4],
                                     std::uint32_t k_shared) const {
#pragma unroll
    for (int tile = 0; tile < Tile::row_tiles; ++tile) {
#pragma unroll
      for (int column = 0; column < Tile::keys / 8; ++column) {
#pragma unroll
        for (float& score : scores[tile][column]) score = 0;
      }
    }
    const std::uint32_t from =
        k_shared + (lane_ % 8 + lane_ / 16 * 8) * Tile::row_bytes + lane_ / 8 % 2 * 16;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      std::uint32_t query[Tile::row_tiles][4];
#pragma unroll
      for (int tile = 0; tile < Tile::row_tiles; ++tile) {
        if constexpr (Tile::query_in_registers) {
#pragma unroll
          for (int i = 0; i < 4; ++i) query[tile][i] = query_[tile][step][i];
        } else {
          load_matrices(query[tile], query_address(tile, step));
        }
      }
#pragma unroll
      for (int pair = 0; pair < Tile::keys / 16; ++pair) {
        std::uint32_t key[4];
        load_matrices(key, from + pair * 16 * Tile::row_bytes + step * 32);
#pragma unroll
        for (int tile = 0; tile < Tile::row_tiles; ++tile) {
          multiply_add<T>(scores[tile][2 * pair], query[tile], key[0], key[1]);
          multiply_add<T>(scores[tile][2 * pair + 1], query[tile], key[2], key[3]);
        }
      }
    }
  }

  /// acc += P V, P rounded to the storage type. P's accumulator layout is that of an operand.
  __device__ void multiply_probability_value(const float (&p)[Tile::row_tiles][Tile::keys / 8][4],
                                             std::uint32_t v_shared) {
    const std::uint32_t from = v_shared + lane_ % 16 * Tile::row_bytes + lane_ / 16 * 16;
#pragma unroll
    for (int step = 0; step < Tile::keys / 16; ++step) {
      std::uint32_t probability[Tile::row_tiles][4];
#pragma unroll
      for (int tile = 0; tile < Tile::row_tiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&pair)[4] = p[tile][2 * step + i / 2];
          probability[tile][i] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int pair = 0; pair < D / 16; ++pair) {
        std::uint32_t value[4];
        load_matrices_transposed(value, from + step * 16 * Tile::row_bytes + pair * 32);
#pragma unroll
        for (int tile = 0; tile < Tile::row_tiles; ++tile) {
          multiply_add<T>(acc_[tile][2 * pair], probability[tile], value[0], value[1]);
          multiply_add<T>(acc_[tile][2 * pair + 1], probability[tile], value[2], value[3]);
        }
      }
    }
  }

  // --- softmax ---

  /// The sequence position of a row of this thread: tile of 16, upper or lower half.
  __device__ std::int64_t row_token(int tile, int half) const {
    return tile_.first_token + warp_ * Tile::warp_rows + tile * 16 + half * 8 + lane_ / 4;
  }

  /// How many keys of the tile a row of this thread sees.
  __device__ int visible_columns(const KeyCursor& cursor, int tile, int half) const {
    const KeyItem& keys = *cursor.keys;
    const std::int64_t first = std::int64_t{cursor.tile} * Tile::keys;
    const std::int64_t left = keys.tokens - first;
    const int present = static_cast<int>(left < Tile::keys ? left : Tile::keys);
    if (!keys.partial) return present;
    return policy_.visible_keys(row_token(tile, half), keys.first_token + first, present);
  }

  __device__ void mask(float (&scores)[Tile::row_tiles][Tile::keys / 8][4],
                       const KeyCursor& cursor) const {
#pragma unroll
    for (int tile = 0; tile < Tile::row_tiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int visible = visible_columns(cursor, tile, half) - lane_ % 4 * 2;
#pragma unroll
        for (int column = 0; column < Tile::keys / 8; ++column) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = scores[tile][column][2 * half + i];
            score = column * 8 + i < visible ? score : -HUGE_VALF;
          }
        }
      }
    }
  }

  /// scores become exp2(scale * score - m), m and l go on, acc is scaled to the new m.
  /// l is the sum of this thread's columns until write_state().
  __device__ void softmax(float (&scores)[Tile::row_tiles][Tile::keys / 8][4]) {
#pragma unroll
    for (int tile = 0; tile < Tile::row_tiles; ++tile) {
      float rescale[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = max_[tile][half];
#pragma unroll
        for (int column = 0; column < Tile::keys / 8; ++column) {
          highest = fmaxf(
              highest, fmaxf(scores[tile][column][2 * half], scores[tile][column][2 * half + 1]));
        }
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
        // No key yet: -infinity minus -infinity would be NaN.
        // Rounded products, here as in write_state(): m is the same number wherever it is used.
        const float m = highest == -HUGE_VALF ? 0.0f : __fmul_rn(highest, scale_);
        rescale[half] = fast_exp2(__fsub_rn(__fmul_rn(max_[tile][half], scale_), m));
        max_[tile][half] = highest;
        float sum = sum_[tile][half] * rescale[half];
#pragma unroll
        for (int column = 0; column < Tile::keys / 8; ++column) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            const float p = fast_exp2(fmaf(scores[tile][column][i], scale_, -m));
            scores[tile][column][i] = p;
            sum += p;
          }
        }
        sum_[tile][half] = sum;
      }
      // Maxima move rarely once many keys are seen. NaN counts as a move.
      if (__any_sync(~0u, !(rescale[0] == 1.0f && rescale[1] == 1.0f))) {
#pragma unroll
        for (int column = 0; column < D / 8; ++column) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc_[tile][column][i] *= rescale[i / 2];
        }
      }
    }
  }

  /// A hidden key has p = 0, and 0 times NaN or infinity is NaN: where the mask cuts through a tile
  /// with such values in V, they go by hand to the rows that see them, and are zero in the product.
  __device__ void reveal_non_finite(const KeyCursor& cursor, std::uint32_t v_offset) {
    if (!cursor.keys->partial) return;  // beyond the chunk's end V is zero
    auto* value = reinterpret_cast<unsigned short*>(shared_ + v_offset);
    constexpr int row_elements = Tile::row_bytes / 2;
    const auto special = [](std::uint32_t bits) {
      return (bits & Format<T>::exponent) == Format<T>::exponent;
    };
    bool found = false;
    for (int at = threadIdx.x; at < Tile::keys * D; at += Tile::threads) {
      found |= special(value[at / D * row_elements + at % D]);
    }
    if (!__syncthreads_or(found)) return;
    for (int key = 0; key < Tile::keys; ++key) {
      const unsigned short* row = value + key * row_elements + lane_ % 4 * 2;
#pragma unroll
      for (int tile = 0; tile < Tile::row_tiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (key >= visible_columns(cursor, tile, i / 2)) continue;
#pragma unroll
          for (int column = 0; column < D / 8; ++column) {
            const std::uint32_t bits = row[column * 8 + i % 2];
            if (special(bits)) acc_[tile][column][i] += Format<T>::value(bits);
          }
        }
      }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < Tile::keys * D; at += Tile::threads) {
      unsigned short& element = value[at / D * row_elements + at % D];
      if (special(element)) element = 0;
    }
    __syncthreads();
  }

  // --- registers to global memory ---

  __device__ void write_state() const {
    const QueryItem& chunk = work_.queries[tile_.item];
#pragma unroll
    for (int tile = 0; tile < Tile::row_tiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sum_[tile][half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const int row = warp_ * Tile::warp_rows + tile * 16 + half * 8 + lane_ / 4;
        if (tile_.first_row + row >= chunk.tokens) continue;
        const std::int64_t at = (tile_.first_row + row) * work_.heads + tile_.head;
        if (lane_ % 4 == 0) {
          const float highest = max_[tile][half];
          chunk.m[at] = highest == -HUGE_VALF ? highest : __fmul_rn(highest, scale_);
          chunk.l[at] = sum;
        }
        float* acc = chunk.acc + at * work_.dim;
#pragma unroll
        for (int column = 0; column < D / 8; ++column) {
          if (column * 8 >= work_.dim) break;
          *reinterpret_cast<float2*>(acc + column * 8 + lane_ % 4 * 2) =
              make_float2(acc_[tile][column][2 * half], acc_[tile][column][2 * half + 1]);
        }
      }
    }
  }

  const AttentionWork& work_;
  const Policy policy_;
  const QueryTile& tile_;           // in shared memory: registers are short
  const std::int64_t key_stride_;   // bytes from token to token of K and V
  const int copy_row_, copy_unit_;  // this thread's share of copies, see start_rows()
  const char *k_from_, *v_from_;    // its first unit of the tile that is copied next
  const int warp_, lane_;
  char* const shared_;
  // [row][D], rows of row_bytes: Q, then two stages of K and V.
  const std::uint32_t q_shared_, k_shared_;
  float scale_ = 1;
  // By query row of this thread, see multiply_query_key().
  std::uint32_t query_[Tile::query_in_registers ? Tile::row_tiles : 1]
                      [Tile::query_in_registers ? D / 16 : 1][4];
  float acc_[Tile::row_tiles][D / 8][4] = {};
  float max_[Tile::row_tiles][2];  // of the unscaled scores
  float sum_[Tile::row_tiles][2] = {};
};

template <class T, int D, int Keys, class Policy>
__global__ void __launch_bounds__(MmaTile<D, Keys>::threads, MmaTile<D, Keys>::blocks_per_sm)
    attention_mma_kernel(const __grid_constant__ AttentionWork work) {
  extern __shared__ __align__(128) char shared[];
  __shared__ QueryTile tile;
  if (threadIdx.x == 0) tile = query_tile<MmaTile<D, Keys>::queries>(work, blockIdx.x);
  __syncthreads();
  MmaAttention<T, D, Keys, Policy>(work, tile, shared).run();
}

}  // namespace stream_cqsa::cuda
