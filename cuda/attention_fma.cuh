// The kernel for float32: plain fma, fp32 throughout.
//
// A block computes one query tile of one query head against all key tiles of its query chunk's work
// list. K and V take turns in one buffer of shared memory; other blocks of the multiprocessor hide
// the wait. Threads are 8 row lanes by 16 key lanes: a thread owns the tile's rows
// row_lane + 8 i, of them the scores of the keys key_lane + 16 j, and every 16th group of acc's
// columns. The 16 key lanes of a row lie in one half of a warp.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <cmath>
#include <cstdint>

#include "cuda/attention.hpp"
#include "cuda/tiles.cuh"

namespace stream_cqsa::cuda {

/// Tile sizes for a padded head dimension.
template <int D>
struct FmaTile {
  static constexpr int queries = D <= 128 ? 64 : 32;
  static constexpr int keys = queries;
  static constexpr int row_lanes = 8;
  static constexpr int key_lanes = 16;
  static constexpr int threads = row_lanes * key_lanes;
  static constexpr int blocks_per_sm = 2;

  static constexpr int thread_rows = queries / row_lanes;
  static constexpr int thread_keys = keys / key_lanes;
  static constexpr int group = D % 64 == 0 ? 4 : 2;  ///< columns that are read together
  static constexpr int thread_groups = D / (key_lanes * group);

  /// Four more floats a row: vectors of four from eight consecutive rows lie in different banks.
  static constexpr int stride = D + 4;
  /// Two consecutive rows of 16 weights lie in different banks.
  static constexpr int weight_stride = keys + 16;
  static constexpr int query_floats = queries * stride;
  static constexpr int key_floats = keys * stride;
  static constexpr int shared_bytes =
      static_cast<int>(sizeof(float)) * (query_floats + key_floats + queries * weight_stride);

  static_assert(queries % row_lanes == 0 && keys % key_lanes == 0);
  static_assert(D % (key_lanes * group) == 0 && keys % 4 == 0);
  static_assert(shared_bytes <= 99 * 1024, "must fit compute capability 8.6 too");
};

template <int D, class Policy>
class FmaAttention {
 public:
  using Tile = FmaTile<D>;
  using Walk = KeyWalk<Tile::keys, Tile::queries, Policy>;

  /// shared: [Tile::shared_bytes], 16-byte aligned.
  __device__ FmaAttention(const AttentionWork& work, std::int64_t block, float* shared)
      : work_(work),
        policy_(work),
        tile_(query_tile<Tile::queries>(work, block)),
        chunk_(work.queries[tile_.item]),
        row_lane_(static_cast<int>(threadIdx.x) / Tile::key_lanes),
        key_lane_(static_cast<int>(threadIdx.x) % Tile::key_lanes),
        query_(shared),
        keys_(shared + Tile::query_floats),
        weights_(keys_ + Tile::key_floats) {
    for (float& m : m_) m = -HUGE_VALF;
  }

  __device__ void run() {
    const std::int64_t row_floats = work_.heads * work_.dim;
    const auto* q = static_cast<const float*>(chunk_.q);
    __syncthreads();  // the buffers of the tile before are free
    start_rows(query_, q + tile_.first_row * row_floats + tile_.head * work_.dim, row_floats,
               tile_rows());
    for (Walk walk(work_, chunk_, tile_.first_token, policy_); !walk.done(); walk.next()) {
      if (walk.whole()) {
        add_tile<false>(walk);
      } else {
        add_tile<true>(walk);
      }
    }
    __pipeline_wait_prior(0);  // Q, where no key was visible
    write_state();
  }

 private:
  /// Rows of the query tile inside the chunk.
  __device__ int tile_rows() const {
    const std::int64_t left = chunk_.tokens - tile_.first_row;
    return left < Tile::queries ? static_cast<int>(left) : Tile::queries;
  }

  /// The sequence position of row i of this thread.
  __device__ std::int64_t query_at(const Walk& walk, int i) const {
    return walk.query_at(row_lane_ + i * Tile::row_lanes);
  }

  // --- global to shared memory ---

  /// Starts the copy of `rows` rows of the head dimension, `row_floats` apart. The rows and columns
  /// beyond keep what lies there: no score or state that counts reads them.
  __device__ void start_rows(float* to, const float* from, std::int64_t row_floats,
                             int rows) const {
    const int vectors = static_cast<int>(work_.dim) / 4;
    for (int i = static_cast<int>(threadIdx.x); i < rows * (D / 4); i += Tile::threads) {
      const int row = i / (D / 4);
      const int vector = i % (D / 4);
      if (vector >= vectors) continue;
      __pipeline_memcpy_async(to + row * Tile::stride + vector * 4,
                              from + row * row_floats + vector * 4, 16);
    }
    __pipeline_commit();
  }

  __device__ void finish_rows() const {
    __pipeline_wait_prior(0);
    __syncthreads();
  }

  // --- one key tile ---

  template <bool masked>
  __device__ void add_tile(const Walk& walk) {
    const std::int64_t row_floats = work_.kv_heads * work_.dim;
    const std::int64_t offset = walk.first_row() * row_floats + tile_.kv_head * work_.dim;
    const int keys = masked ? walk.present() : Tile::keys;
    start_rows(keys_, static_cast<const float*>(walk.keys->k) + offset, row_floats, keys);
    finish_rows();
    float scores[Tile::thread_rows][Tile::thread_keys] = {};
    multiply_query_key(scores);
    __syncthreads();  // everybody is done with K
    start_rows(keys_, static_cast<const float*>(walk.keys->v) + offset, row_floats, keys);
    softmax<masked>(scores, walk);
    finish_rows();  // and the weights are there
    if constexpr (masked) {
      multiply_visible_weights_value(walk);
    } else {
      multiply_weights_value();
    }
    __syncthreads();  // everybody is done with V and the weights
  }

  /// scores = Q K^T
  __device__ void multiply_query_key(float (&scores)[Tile::thread_rows][Tile::thread_keys]) const {
    const float* q = query_ + row_lane_ * Tile::stride;
    const float* k = keys_ + key_lane_ * Tile::stride;
    const int dim = static_cast<int>(work_.dim);
#pragma unroll 2
    for (int column = 0; column < dim; column += 4) {
      float4 key[Tile::thread_keys];
#pragma unroll
      for (int j = 0; j < Tile::thread_keys; ++j) {
        key[j] = *reinterpret_cast<const float4*>(k + j * Tile::key_lanes * Tile::stride + column);
      }
#pragma unroll
      for (int i = 0; i < Tile::thread_rows; ++i) {
        const float4 query =
            *reinterpret_cast<const float4*>(q + i * Tile::row_lanes * Tile::stride + column);
#pragma unroll
        for (int j = 0; j < Tile::thread_keys; ++j) {
          float& score = scores[i][j];
          score = fmaf(query.x, key[j].x, score);
          score = fmaf(query.y, key[j].y, score);
          score = fmaf(query.z, key[j].z, score);
          score = fmaf(query.w, key[j].w, score);
        }
      }
    }
  }

  /// Turns scores into weights exp2(s - m), for everybody to read; m and l go on, acc is scaled to
  /// the new m. A score that the mask hides becomes -infinity whatever it was.
  template <bool masked>
  __device__ void softmax(const float (&scores)[Tile::thread_rows][Tile::thread_keys],
                          const Walk& walk) {
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; ++i) {
      const int row = row_lane_ + i * Tile::row_lanes;
      const std::int64_t query = query_at(walk, i);
      const KeyColumns seen = masked ? walk.columns(query) : KeyColumns{0, Tile::keys};
      float s[Tile::thread_keys];
      float max = m_[i];
#pragma unroll
      for (int j = 0; j < Tile::thread_keys; ++j) {
        const int key = key_lane_ + j * Tile::key_lanes;
        // A rounded product, not part of an fma: m is the same number wherever it is used.
        s[j] = __fmul_rn(scores[i][j], work_.scale_log2);
        if (masked && !seen.contain(key)) {
          s[j] = -HUGE_VALF;
        } else if constexpr (Policy::changes_scores) {
          s[j] = policy_.score(s[j], query, walk.first_key() + key);
        }
        max = fmaxf(max, s[j]);  // ignores NaN, which reaches l and acc by its weight
      }
#pragma unroll
      for (int lanes = Tile::key_lanes / 2; lanes > 0; lanes /= 2) {
        max = fmaxf(max, __shfl_xor_sync(~0u, max, lanes));
      }
      // No key yet, or scores of -infinity alone: -infinity minus -infinity would be NaN.
      const float shift = max == -HUGE_VALF ? 0.0f : max;
      const float rescale = exp2f(m_[i] - shift);
      float sum = l_[i] * rescale;
#pragma unroll
      for (int j = 0; j < Tile::thread_keys; ++j) {
        const float weight = exp2f(s[j] - shift);
        weights_[row * Tile::weight_stride + key_lane_ + j * Tile::key_lanes] = weight;
        sum += weight;
      }
      m_[i] = max;
      l_[i] = sum;
      if (rescale == 1.0f) continue;  // NaN is not
#pragma unroll
      for (int g = 0; g < Tile::thread_groups; ++g) {
#pragma unroll
        for (float& acc : acc_[i][g]) acc *= rescale;
      }
    }
  }

  /// This thread's columns of V's row `key`.
  __device__ void load_value(float (&value)[Tile::thread_groups][Tile::group], int key) const {
    const float* row = keys_ + key * Tile::stride + key_lane_ * Tile::group;
#pragma unroll
    for (int g = 0; g < Tile::thread_groups; ++g) {
      const float* from = row + g * Tile::key_lanes * Tile::group;
      if constexpr (Tile::group == 4) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        value[g][0] = four.x;
        value[g][1] = four.y;
        value[g][2] = four.z;
        value[g][3] = four.w;
      } else {
        const float2 two = *reinterpret_cast<const float2*>(from);
        value[g][0] = two.x;
        value[g][1] = two.y;
      }
    }
  }

  /// acc += P V, four keys at a time
  __device__ void multiply_weights_value() {
    const float* p = weights_ + row_lane_ * Tile::weight_stride;
#pragma unroll 1
    for (int first = 0; first < Tile::keys; first += 4) {
      float weight[Tile::thread_rows][4];
#pragma unroll
      for (int i = 0; i < Tile::thread_rows; ++i) {
        const float4 four =
            *reinterpret_cast<const float4*>(p + i * Tile::row_lanes * Tile::weight_stride + first);
        weight[i][0] = four.x;
        weight[i][1] = four.y;
        weight[i][2] = four.z;
        weight[i][3] = four.w;
      }
#pragma unroll
      for (int key = 0; key < 4; ++key) {
        float value[Tile::thread_groups][Tile::group];
        load_value(value, first + key);
#pragma unroll
        for (int i = 0; i < Tile::thread_rows; ++i) {
#pragma unroll
          for (int g = 0; g < Tile::thread_groups; ++g) {
#pragma unroll
            for (int c = 0; c < Tile::group; ++c) {
              acc_[i][g][c] = fmaf(weight[i][key], value[g][c], acc_[i][g][c]);
            }
          }
        }
      }
    }
  }

  /// The same for a masked tile, key by key. Where a row does not see the key nothing is added:
  /// weight 0 times NaN or infinity would be NaN.
  __device__ void multiply_visible_weights_value(const Walk& walk) {
    KeyColumns seen[Tile::thread_rows];
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; ++i) seen[i] = walk.columns(query_at(walk, i));
    const int keys = walk.present();
#pragma unroll 1
    for (int key = 0; key < keys; ++key) {
      float value[Tile::thread_groups][Tile::group];
      load_value(value, key);
#pragma unroll
      for (int i = 0; i < Tile::thread_rows; ++i) {
        if (!seen[i].contain(key)) continue;
        const int row = row_lane_ + i * Tile::row_lanes;
        const float weight = weights_[row * Tile::weight_stride + key];
#pragma unroll
        for (int g = 0; g < Tile::thread_groups; ++g) {
#pragma unroll
          for (int c = 0; c < Tile::group; ++c) {
            acc_[i][g][c] = fmaf(weight, value[g][c], acc_[i][g][c]);
          }
        }
      }
    }
  }

  // --- registers to global memory ---

  __device__ void write_state() const {
    const int rows = tile_rows();
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; ++i) {
      float sum = l_[i];  // of this thread's keys until here
#pragma unroll
      for (int lanes = Tile::key_lanes / 2; lanes > 0; lanes /= 2) {
        sum += __shfl_xor_sync(~0u, sum, lanes);
      }
      const int row = row_lane_ + i * Tile::row_lanes;
      if (row >= rows) continue;
      const std::int64_t at = (tile_.first_row + row) * work_.heads + tile_.head;
      if (key_lane_ == 0) {
        chunk_.m[at] = m_[i];
        chunk_.l[at] = sum;
      }
#pragma unroll
      for (int g = 0; g < Tile::thread_groups; ++g) {
        const int column = (g * Tile::key_lanes + key_lane_) * Tile::group;
        if (column < work_.dim) write_group(chunk_.acc + at * work_.dim + column, acc_[i][g]);
      }
    }
  }

  static __device__ void write_group(float* to, const float (&group)[Tile::group]) {
    if constexpr (Tile::group == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(group[0], group[1], group[2], group[3]);
    } else {
      *reinterpret_cast<float2*>(to) = make_float2(group[0], group[1]);
    }
  }

  const AttentionWork& work_;
  const Policy policy_;
  const QueryTile tile_;
  const QueryItem& chunk_;
  const int row_lane_, key_lane_;
  float* const query_;    // [Tile::queries][Tile::stride]
  float* const keys_;     // [Tile::keys][Tile::stride], K or V
  float* const weights_;  // [Tile::queries][Tile::weight_stride]
  // By query row of this thread.
  float acc_[Tile::thread_rows][Tile::thread_groups][Tile::group] = {};
  float m_[Tile::thread_rows];
  float l_[Tile::thread_rows] = {};
};

template <int D, class Policy>
__global__ void __launch_bounds__(FmaTile<D>::threads, FmaTile<D>::blocks_per_sm)
    attention_fma_kernel(const __grid_constant__ AttentionWork work) {
  extern __shared__ __align__(16) float shared_floats[];
  for (std::int64_t block = blockIdx.x; block < work.tiles * work.heads; block += gridDim.x) {
    if (__syncthreads_or(threadIdx.x == 0 && cancelled(work))) return;
    FmaAttention<D, Policy>(work, block, shared_floats).run();
  }
}

}  // namespace stream_cqsa::cuda
