// The portable kernel for 16-bit types: tensor cores by mma.sync, from compute capability 8.0 on.
//
// A block computes one query tile of one query head against all key tiles of its query chunk's work
// list, K and V one tile ahead by asynchronous copies. Each warp owns whole query rows.
// Structure as in FlashAttention-2 (arXiv 2307.08691).
#pragma once

#include <cstdint>

#include "cuda/attention.hpp"
#include "cuda/attention_mma_non_finite.cuh"
#include "cuda/attention_mma_tile.cuh"
#include "cuda/mma.cuh"
#include "cuda/tiles.cuh"

namespace stream_cqsa::cuda {

template <class T, int D, int Keys, class Policy>
class MmaAttention {
 public:
  using Tile = MmaTile<D, Keys>;
  using Walk = KeyWalk<Keys, Tile::queries, Policy>;

  __device__ MmaAttention(const AttentionWork& work, const QueryTile& tile, char* shared)
      : work_(work),
        policy_(work),
        tile_(tile),
        key_stride_(static_cast<int>(2 * work.kv_heads * work.dim)),
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
    Walk walk(work_, chunk, tile_.first_token, policy_);
    find_keys(walk);
    start_query();
    start_tile(walk, 0);
    finish_query();
    for (int stage = 0; !walk.done(); stage ^= 1) {
      wait_copies();
      __syncthreads();  // this tile has arrived; everybody is done with the tile before
      const Walk current = walk;
      next_tile(walk);
      start_tile(walk, stage ^ 1);
      add_tile(current, k_shared_ + stage * 2 * Tile::key_bytes);
    }
    wait_copies();  // of Q, where no key was visible
    write_state();
  }

 private:
  // --- the work list ---

  __device__ void find_keys(const Walk& walk) {
    if (walk.done()) return;
    const std::int64_t row = copy_row_ + std::int64_t{walk.tile} * Tile::keys;
    const std::int64_t offset = row * key_stride_ + 16 * copy_unit_ + 2 * tile_.kv_head * work_.dim;
    k_from_ = static_cast<const char*>(walk.keys->k) + offset;
    v_from_ = static_cast<const char*>(walk.keys->v) + offset;
  }

  __device__ void next_tile(Walk& walk) {
    if (walk.next()) return find_keys(walk);
    k_from_ += std::int64_t{Tile::keys} * key_stride_;
    v_from_ += std::int64_t{Tile::keys} * key_stride_;
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
      copy_async(to + row * Tile::row_bytes, copied ? from + std::int64_t{row} * stride : from,
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

  __device__ void start_tile(const Walk& walk, int stage) const {
    if (walk.done()) return;
    const std::uint32_t k = k_shared_ + stage * 2 * Tile::key_bytes;
    const std::uint32_t v = k + Tile::key_bytes;
    if (walk.whole()) {
      start_rows<Tile::keys, true>(k, k_from_, key_stride_, 0);
      start_rows<Tile::keys, true>(v, v_from_, key_stride_, 0);
    } else {
      const int present = walk.present();
      start_rows<Tile::keys, false>(k, k_from_, key_stride_, present);
      start_rows<Tile::keys, false>(v, v_from_, key_stride_, present);
    }
  }

  /// Q has arrived. Where the maximum is taken before scaling, the sign of a scale that is not
  /// positive goes into Q.
  __device__ void finish_query() {
    if constexpr (!Policy::changes_scores) scale_ = fabsf(work_.scale_log2);
    const bool changed = Policy::changes_scores ? work_.scale_log2 == 0 : !(work_.scale_log2 > 0);
    if (!Tile::query_in_registers && !changed) return;
    wait_copies();
    __syncthreads();
    if (changed) {
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
      const std::uint32_t zeroed = is_finite<T>(bits) ? 0 : Format<T>::nan;
      elements[at] = static_cast<unsigned short>(zero ? zeroed : bits ^ 0x8000u);
    }
  }

  // --- one key tile ---

  __device__ void add_tile(const Walk& walk, std::uint32_t k_shared) {
    const bool whole = walk.whole();
    char* value = shared_ + (k_shared - q_shared_ + Tile::key_bytes);
    // Beyond the chunk's end V is zero.
    const bool special = !whole && walk.keys->partial && any_non_finite<T, Tile>(value);
    float scores[Tile::row_tiles][Tile::keys / 8][4];
    multiply_query_key(scores, k_shared);
    if (Policy::changes_scores || !whole) mask(scores, walk);
    softmax(scores);
    if (special) reveal_non_finite<T, Tile>(acc_, value, walk, row(0, 0), lane_);
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

  /// A row of this thread in the query tile: tile of 16, upper or lower half.
  __device__ int row(int tile, int half) const {
    return warp_ * Tile::warp_rows + tile * 16 + half * 8 + lane_ / 4;
  }

  /// Hides the scores of keys that a row does not see; the policy changes the others.
  __device__ void mask(float (&scores)[Tile::row_tiles][Tile::keys / 8][4],
                       const Walk& walk) const {
#pragma unroll
    for (int tile = 0; tile < Tile::row_tiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::int64_t query = walk.query_at(row(tile, half));
        const int first = lane_ % 4 * 2;
        const KeyColumns columns = walk.columns(query);
        const KeyColumns seen{columns.begin - first, columns.end - first};
#pragma unroll
        for (int column = 0; column < Tile::keys / 8; ++column) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = scores[tile][column][2 * half + i];
            if (!seen.contain(column * 8 + i)) {
              score = -HUGE_VALF;
            } else if constexpr (Policy::changes_scores) {
              const float scaled = __fmul_rn(score, work_.scale_log2);
              score = policy_.score(scaled, query, walk.first_key() + first + column * 8 + i);
            }
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
        const float sum = weigh(scores[tile], half, m);
        sum_[tile][half] = fmaf(sum_[tile][half], rescale[half], sum);
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

  /// The scores of a row become exp2(scale * score - m); returns their sum.
  __device__ float weigh(float (&scores)[Tile::keys / 8][4], int half, float m) const {
    const auto fused = [&](float score) { return fmaf(score, scale_, -m); };
    const bool huge = fabsf(m) > huge_score;
    if (!__any_sync(~0u, huge)) return weigh(scores, half, fused);
    // m is a rounded product: where its rounding is large, the score's must be the same.
    return weigh(scores, half, [&](float score) {
      return huge ? __fsub_rn(__fmul_rn(score, scale_), m) : fused(score);
    });
  }

  template <class Shifted>
  __device__ float weigh(float (&scores)[Tile::keys / 8][4], int half, Shifted shifted) const {
    float sum = 0;
#pragma unroll
    for (int column = 0; column < Tile::keys / 8; ++column) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        float& score = scores[column][i];
        score = fast_exp2(shifted(score));
        sum += score;
      }
    }
    return sum;
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
        const std::int64_t token = tile_.first_row + row(tile, half);
        if (token >= chunk.tokens) continue;
        const std::int64_t at = token * work_.heads + tile_.head;
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
  const int key_stride_;            // bytes from token to token of K and V
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
  if (work.non_finite != nullptr && *work.non_finite == 0) return;  // another kernel's
  extern __shared__ __align__(128) char shared[];
  __shared__ QueryTile tile;
  bool stop = false;
  if (threadIdx.x == 0) {
    stop = cancelled(work);
    tile = query_tile<MmaTile<D, Keys>::queries>(work, blockIdx.x);
  }
  if (__syncthreads_or(stop)) return;
  MmaAttention<T, D, Keys, Policy>(work, tile, shared).run();
}

}  // namespace stream_cqsa::cuda
