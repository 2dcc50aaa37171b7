// The Hopper kernel's online softmax, of the two query rows that a thread has.
#pragma once

#include <cstdint>

#include "cuda/attention.hpp"
#include "cuda/attention_hopper_tile.cuh"
#include "cuda/mma.cuh"
#include "cuda/score_policy.cuh"
#include "cuda/tiles.cuh"

namespace stream_cqsa::cuda {

/// Turns scores into weights p = exp2(scale * score - m). A thread's scores are of two rows, 8
/// apart, and of the columns 2 (lane % 4) and the next of each 8: [column / 8][row][2].
///
/// m may stay what earlier tiles left as long as no weight gets large: then a tile costs neither
/// its maximum nor a rescale. State and merge are exact for any m; fp32, f16 and bf16 weights are
/// as precise above 1 as below.
template <class Tile, class Policy>
class HopperSoftmax {
 public:
  using Scores = typename Tile::Scores;

  /// `row` is the first of this thread's two, in the query tile.
  __device__ HopperSoftmax(const AttentionWork& work, const QueryTile& tile, int row)
      : work_(work), policy_(work), tile_(tile), row_(row) {
    if constexpr (!Policy::changes_scores)
      scale_ = work.scale_log2 == 0 ? 1 : fabsf(work.scale_log2);
  }

  /// In the query tile.
  __device__ int row(int half) const { return row_ + 8 * half; }

  /// Whether weights_by_earlier_maximum() is worth a try on this tile; the same in a warp.
  __device__ bool settled(const Ticket& ticket) const {
    return !Policy::changes_scores && settled_ && ticket.whole();
  }

  /// False where a weight is too large or NaN, in any row of the warp; then the scores are spoilt
  /// and nothing else has changed.
  __device__ bool weights_by_earlier_maximum(Scores& scores) {
    const float m[2] = {__fmul_rn(max_[0], scale_), __fmul_rn(max_[1], scale_)};
    float sum[2] = {};
    exponentiate<false>(scores, m, sum);
    if (__any_sync(~0u, !(sum[0] <= highest_sum && sum[1] <= highest_sum))) return false;
    sum_[0] += sum[0];
    sum_[1] += sum[1];
    moved_ = false;
    return true;
  }

  __device__ void weights(Scores& scores, const Ticket& ticket) {
    if (Policy::changes_scores || !ticket.whole()) mask(scores, ticket);
    float m[2];
    bool huge = false;
    bool far = false;  // the next tile's maximum may move as far
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float highest = row_maximum(scores, half);
      // No key yet: -infinity minus -infinity would be NaN.
      m[half] = highest == -HUGE_VALF ? 0.0f : __fmul_rn(highest, scale_);
      rescale_[half] = fast_exp2(__fsub_rn(__fmul_rn(max_[half], scale_), m[half]));
      far |= !(rescale_[half] * highest_sum >= 1.0f);
      max_[half] = highest;
      sum_[half] *= rescale_[half];
      huge |= fabsf(m[half]) > huge_score;
    }
    huge = __any_sync(~0u, huge);
    settled_ = !__any_sync(~0u, huge || far);
    // Maxima move rarely once many keys are seen. NaN counts as a move.
    moved_ = __any_sync(~0u, !(rescale_[0] == 1.0f && rescale_[1] == 1.0f));
    if (huge) {
      exponentiate<true>(scores, m, sum_);
    } else {
      exponentiate<false>(scores, m, sum_);
    }
  }

  /// What was accumulated before this tile, in the same layout as the scores.
  template <int Columns>
  __device__ void rescale(float (&acc)[Columns]) const {
    if (!moved_) return;
#pragma unroll
    for (int i = 0; i < Columns; ++i) acc[i] *= rescale_[i / 2 % 2];
  }

  /// l of the row, by all threads of the warp.
  __device__ float sum(int half) const {
    const float sum = sum_[half] + __shfl_xor_sync(~0u, sum_[half], 1);
    return sum + __shfl_xor_sync(~0u, sum, 2);
  }

  __device__ float maximum(int half) const {
    return max_[half] == -HUGE_VALF ? max_[half] : __fmul_rn(max_[half], scale_);
  }

 private:
  /// Of a thread's weights in a tile. Below it fp32 has room for any V that 16 bits hold but the
  /// largest of bf16.
  static constexpr float highest_sum = 512;

  __device__ float row_maximum(const Scores& scores, int half) const {
    float highest = max_[half];
#pragma unroll
    for (int column = 0; column < Tile::keys / 8; ++column) {
      highest =
          fmaxf(highest, fmaxf(scores[4 * column + 2 * half], scores[4 * column + 2 * half + 1]));
    }
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    return fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
  }

  /// Adds the weights to `sums`.
  template <bool any_huge>
  __device__ void exponentiate(Scores& scores, const float (&m)[2], float (&sums)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool huge = any_huge && fabsf(m[half]) > huge_score;
      float sum = sums[half];
#pragma unroll
      for (int column = 0; column < Tile::keys / 8; ++column) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          float& score = scores[4 * column + i];
          // m is a rounded product: where its rounding is large, the score's must be the same.
          score = fast_exp2(huge ? __fsub_rn(__fmul_rn(score, scale_), m[half])
                                 : fmaf(score, scale_, -m[half]));
          sum += score;
        }
      }
      sums[half] = sum;
    }
  }

  __device__ void mask(Scores& scores, const Ticket& ticket) const {
    const KeyTile<Tile::keys> keys{work_.keys + ticket.key, ticket.tile()};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t query = query_at(row(half));
      const KeyColumns seen = keys.columns(policy_, query);
#pragma unroll
      for (int column = 0; column < Tile::keys / 8; ++column) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = column * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i;
          float& score = scores[4 * column + 2 * half + i];
          if (!seen.contain(key)) {
            score = -HUGE_VALF;
          } else if constexpr (Policy::changes_scores) {
            score =
                policy_.score(__fmul_rn(score, work_.scale_log2), query, keys.first_key() + key);
          }
        }
      }
    }
  }

  /// The sequence position of a row of the query tile. Rows beyond the chunk count as its last.
  __device__ std::int64_t query_at(int row) const {
    const std::int64_t last = work_.queries[tile_.item].tokens - 1 - tile_.first_row;
    return tile_.first_token + (row < last ? row : last);
  }

  const AttentionWork& work_;
  const Policy policy_;
  const QueryTile& tile_;
  const int row_;
  float scale_ = 1;
  float max_[2] = {-HUGE_VALF, -HUGE_VALF};  // of the unscaled scores
  float sum_[2] = {};                        // of this thread's columns
  float rescale_[2];                         // of what is accumulated, by the last tile
  bool moved_ = false;    // whether rescale_ is not 1 somewhere; the same in a warp
  bool settled_ = false;  // whether earlier maxima may do; likewise
};

}  // namespace stream_cqsa::cuda
