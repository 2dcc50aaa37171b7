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
/// as precise above 1 as below. Each row decides for itself, whatever the others hold.
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
    return !Policy::changes_scores && any_settled_ && ticket.whole();
  }

  /// False where some row of the warp is `pending`: its maximum is not known or huge, or a weight
  /// is too large or NaN. The scores of those rows are spoilt; the others are done.
  __device__ bool weights_by_earlier_maximum(Scores& scores, bool (&pending)[2]) {
    const float m[2] = {__fmul_rn(max_[0], scale_), __fmul_rn(max_[1], scale_)};
    float sum[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) exponentiate<false>(scores, half, m[half], sum[half]);
    pending[0] = !(settled(m[0]) && sum[0] <= highest_sum);
    pending[1] = !(settled(m[1]) && sum[1] <= highest_sum);
    moved_ = false;
    const bool done = !__any_sync(~0u, pending[0] || pending[1]);
    if (!done) {
      pending[0] = any_of_row(pending[0]);
      pending[1] = any_of_row(pending[1]);
    }
    if (!pending[0]) sum_[0] += sum[0];
    if (!pending[1]) sum_[1] += sum[1];
    return done;
  }

  /// Of the pending rows.
  __device__ void weights(Scores& scores, const Ticket& ticket, const bool (&pending)[2]) {
    if (Policy::changes_scores || !ticket.whole()) mask(scores, ticket);
    float m[2];
    bool huge = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float highest = row_maximum(scores, half);
      // No key yet: -infinity minus -infinity would be NaN.
      m[half] = highest == -HUGE_VALF ? 0.0f : __fmul_rn(highest, scale_);
      const float rescale = fast_exp2(__fsub_rn(__fmul_rn(max_[half], scale_), m[half]));
      rescale_[half] = pending[half] ? rescale : 1.0f;
      if (!pending[half]) continue;
      max_[half] = highest;
      sum_[half] *= rescale;
      huge |= fabsf(m[half]) > huge_score;
    }
    huge = __any_sync(~0u, huge);
    any_settled_ = __any_sync(~0u, settled(max_[0] * scale_) || settled(max_[1] * scale_));
    // Maxima move rarely once many keys are seen. NaN counts as a move.
    moved_ = __any_sync(~0u, !(rescale_[0] == 1.0f && rescale_[1] == 1.0f));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!pending[half]) continue;
      if (huge) {
        exponentiate<true>(scores, half, m[half], sum_[half]);
      } else {
        exponentiate<false>(scores, half, m[half], sum_[half]);
      }
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
  /// Of a thread's weights in a tile, so that a key's weight is below 2^5 on average. Where the
  /// largest |V| times the keys is at most 2^122, up to which rows are verified, acc is below
  /// 2^127.
  static constexpr float highest_sum = 512;
  static_assert(highest_sum / (Tile::keys / 4) < 32);

  /// Whether a row's m is known, and not huge.
  __device__ static bool settled(float m) { return fabsf(m) <= huge_score; }

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

  /// Whether it is true in any of the four threads that share the row.
  __device__ static bool any_of_row(bool of_thread) {
    const unsigned row = 0xfu << (threadIdx.x % 32 & ~3u);
    return (__ballot_sync(~0u, of_thread) & row) != 0;
  }

  /// Of one row; adds the weights to `sum`.
  template <bool maybe_huge>
  __device__ void exponentiate(Scores& scores, int half, float m, float& sum) const {
    const bool huge = maybe_huge && fabsf(m) > huge_score;
#pragma unroll
    for (int column = 0; column < Tile::keys / 8; ++column) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        float& score = scores[4 * column + i];
        // m is a rounded product: where its rounding is large, the score's must be the same.
        score = fast_exp2(huge ? __fsub_rn(__fmul_rn(score, scale_), m) : fmaf(score, scale_, -m));
        sum += score;
      }
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
  bool moved_ = false;        // whether rescale_ is not 1 somewhere; the same in a warp
  bool any_settled_ = false;  // of the warp's rows
};

}  // namespace stream_cqsa::cuda
