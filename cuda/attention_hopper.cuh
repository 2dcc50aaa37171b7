// The kernel for compute capability 9.0a, f16 and bf16, D = 64 and 128.
//
// A block computes one query tile of one query head. A producer warpgroup feeds shared memory by
// tensor copies; each consumer warpgroup owns 64 query rows, and the softmax of a key tile runs
// beside the products of its neighbours. Structure as in FlashAttention-3 (arXiv 2407.08608).
#pragma once

#include <cstdint>

#include "cuda/attention.hpp"
#include "cuda/hopper.cuh"
#include "cuda/mma.cuh"
#include "cuda/score_policy.cuh"
#include "cuda/tiles.cuh"

namespace stream_cqsa::cuda {

template <int D>
struct HopperTile {
  static_assert(D == 64 || D == 128);
  static constexpr int consumers = D == 64 ? 3 : 2;  ///< warpgroups
  static constexpr int queries = 64 * consumers;
  static constexpr int keys = 128;
  static constexpr int stages = D == 64 ? 4 : 2;

  static constexpr int warpgroup = 128;
  static constexpr int threads = warpgroup * (1 + consumers);
  static constexpr int columns = D / 64;  ///< of 128 bytes
  static constexpr int query_bytes = queries * D * 2;
  static constexpr int key_bytes = keys * D * 2;  ///< of K, or V
  static constexpr int alignment = 1024;          ///< of swizzled tiles
  static constexpr int shared_bytes = query_bytes + stages * 2 * key_bytes + alignment;
  // 64K registers, in multiples of 8 a thread.
  static constexpr int producer_registers = consumers == 2 ? 40 : 32;
  static constexpr int consumer_registers = consumers == 2 ? 232 : 160;
};

/// Q and K/V slots as tensors [slot][token][head][dim]; K and V count as slots of their own.
struct HopperMaps {
  CUtensorMap query, key;
};

/// A tile's place in shared memory and the barriers around it.
template <int D>
struct HopperShared {
  using Tile = HopperTile<D>;
  std::uint32_t base;      // Q, then K stages, then V stages; 1024-byte aligned
  std::uint32_t barriers;  // query full, then per stage: K full, V full, K empty, V empty

  __device__ std::uint32_t query() const { return base; }
  __device__ std::uint32_t key(int stage) const {
    return base + Tile::query_bytes + stage * Tile::key_bytes;
  }
  __device__ std::uint32_t value(int stage) const { return key(Tile::stages + stage); }
  __device__ std::uint32_t query_full() const { return barriers; }
  __device__ std::uint32_t key_full(int stage) const { return barriers + 8 + 32 * stage; }
  __device__ std::uint32_t value_full(int stage) const { return key_full(stage) + 8; }
  __device__ std::uint32_t key_empty(int stage) const { return key_full(stage) + 16; }
  __device__ std::uint32_t value_empty(int stage) const { return key_full(stage) + 24; }

  __device__ void init_barriers() const {
    barrier_init(query_full(), 1);
    for (int stage = 0; stage < Tile::stages; ++stage) {
      barrier_init(key_full(stage), 1);
      barrier_init(value_full(stage), 1);
      barrier_init(key_empty(stage), Tile::consumers);
      barrier_init(value_empty(stage), Tile::consumers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
};

/// Counts tiles through the ring of stages.
template <int Stages>
struct StageCounter {
  int stage = 0;
  int parity = 0;
  __device__ void next() {
    if (++stage < Stages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <int D, class Policy>
__device__ void produce(const AttentionWork& work, const HopperMaps& maps, const QueryTile& tile,
                        const HopperShared<D>& shared) {
  using Tile = HopperTile<D>;
  const QueryItem& chunk = work.queries[tile.item];
  barrier_expect(shared.query_full(), Tile::query_bytes);
  for (int column = 0; column < Tile::columns; ++column) {
    copy_box(shared.query() + column * Tile::queries * 128, maps.query, 64 * column,
             static_cast<int>(tile.head), static_cast<int>(tile.first_row),
             static_cast<int>(chunk.slot), shared.query_full());
  }
  const Policy policy(work);
  KeyWalk<Tile::keys, Tile::queries, Policy> walk(work, chunk, tile.first_token, policy);
  StageCounter<Tile::stages> at;
  for (; !walk.done(); walk.next(), at.next()) {
    const int slot = static_cast<int>(walk.keys->slot);
    const int token = walk.tile * Tile::keys;
    const auto load = [&](std::uint32_t to, std::uint32_t empty, std::uint32_t full, int part) {
      barrier_wait(empty, at.parity ^ 1);
      barrier_expect(full, Tile::key_bytes);
      for (int column = 0; column < Tile::columns; ++column) {
        copy_box(to + column * Tile::keys * 128, maps.key, 64 * column,
                 static_cast<int>(tile.kv_head), token, 2 * slot + part, full);
      }
    };
    load(shared.key(at.stage), shared.key_empty(at.stage), shared.key_full(at.stage), 0);
    load(shared.value(at.stage), shared.value_empty(at.stage), shared.value_full(at.stage), 1);
  }
}

template <class T, int D, class Policy>
class HopperConsumer {
 public:
  using Tile = HopperTile<D>;

  __device__ HopperConsumer(const AttentionWork& work, const QueryTile& tile,
                            const HopperShared<D>& shared, int number)
      : work_(work),
        policy_(work),
        tile_(tile),
        shared_(shared),
        number_(number),
        thread_(static_cast<int>(threadIdx.x) % Tile::warpgroup) {
    row_[0] = number * 64 + thread_ / 32 * 16 + thread_ % 32 / 4;
    row_[1] = row_[0] + 8;
  }

  __device__ void run() {
    const QueryItem& chunk = work_.queries[tile_.item];
    Walk walk(work_, chunk, tile_.first_token, policy_);
    barrier_wait(shared_.query_full(), 0);
    prepare_query();
    if (!walk.done()) {
      StageCounter<Tile::stages> key, value;
      start_scores(key);
      wgmma_wait<0>();
      release(shared_.key_empty(key.stage));
      key.next();
      softmax(walk);
      pack_probabilities();
      if (number_ == 0) give_turn(0);
      for (walk.next(); !walk.done(); walk.next()) {
        barrier_wait(shared_.key_full(key.stage), key.parity);
        take_turn();
        start_scores(key);
        start_output(value);
        give_turn((number_ + 1) % Tile::consumers);
        wgmma_wait<1>();
        release(shared_.key_empty(key.stage));
        key.next();
        softmax(walk);
        wgmma_wait<0>();
        release(shared_.value_empty(value.stage));
        value.next();
        rescale();
        pack_probabilities();
      }
      start_output(value);
      wgmma_wait<0>();
      release(shared_.value_empty(value.stage));
    }
    write_state(chunk);
  }

 private:
  using Walk = KeyWalk<Tile::keys, Tile::queries, Policy>;

  // Consumers put their products on the tensor cores in turn: while one's run, the others' softmax
  // does. All have equally many tiles.
  __device__ static int turn(int consumer) { return 1 + Tile::consumers + consumer; }
  __device__ void take_turn() const { named_barrier_sync(turn(number_), 2 * Tile::warpgroup); }
  __device__ void give_turn(int consumer) const {
    named_barrier_arrive(turn(consumer), 2 * Tile::warpgroup);
  }

  __device__ void release(std::uint32_t barrier) const {
    if (thread_ == 0) barrier_arrive(barrier);
  }

  /// Where the scale is not positive, as the portable kernel does.
  __device__ void prepare_query() {
    if constexpr (!Policy::changes_scores) scale_ = fabsf(work_.scale_log2);
    const bool zero = work_.scale_log2 == 0;
    if (Policy::changes_scores ? !zero : work_.scale_log2 > 0) return;
    // Where the maximum is taken before scaling, the sign goes into Q.
    if (zero) scale_ = 1;
    for (int at = thread_; at < 64 * D; at += Tile::warpgroup) {
      const std::uint32_t address = shared_.query() + at / 64 / 64 * Tile::queries * 128 +
                                    number_ * 64 * 128 + at % (64 * 64) * 2;
      unsigned short bits;
      asm volatile("ld.shared.u16 %0, [%1];\n" : "=h"(bits) : "r"(address) : "memory");
      const bool finite = (bits & Format<T>::exponent) != Format<T>::exponent;
      const std::uint32_t zeroed = finite ? 0 : Format<T>::nan;
      bits = static_cast<unsigned short>(zero ? zeroed : bits ^ 0x8000u);
      asm volatile("st.shared.u16 [%0], %1;\n" ::"r"(address), "h"(bits) : "memory");
    }
    fence_shared();
    named_barrier_sync(1 + number_, Tile::warpgroup);
  }

  /// scores = Q K^T. A thread holds two rows of its warp's 16, see row_, and the columns
  /// 2 (lane % 4) and the next of each 8.
  __device__ void start_scores(const StageCounter<Tile::stages>& at) {
    barrier_wait(shared_.key_full(at.stage), at.parity);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const int offset = step % 4 * 32;
      const std::uint32_t q = shared_.query() + step / 4 * Tile::queries * 128 + number_ * 64 * 128;
      const std::uint32_t k = shared_.key(at.stage) + step / 4 * Tile::keys * 128;
      wgmma_shared<T>(scores_, wgmma_descriptor(q + offset, 0), wgmma_descriptor(k + offset, 0),
                      step > 0);
    }
    wgmma_commit();
  }

  /// acc += P V.
  __device__ void start_output(const StageCounter<Tile::stages>& at) {
    barrier_wait(shared_.value_full(at.stage), at.parity);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tile::keys / 16; ++step) {
      const std::uint32_t v = shared_.value(at.stage) + step * 16 * 128;
      wgmma_registers<T>(acc_, probabilities_[step], wgmma_descriptor(v, Tile::keys * 128), 1);
    }
    wgmma_commit();
  }

  /// scores become p = exp2(scale * score - m), m and l go on.
  /// l is the sum of this thread's columns until write_state().
  __device__ void softmax(const Walk& walk) {
    if (Policy::changes_scores || !walk.whole()) mask(walk);
    float m[2];
    bool huge = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = max_[half];
#pragma unroll
      for (int column = 0; column < Tile::keys / 8; ++column) {
        highest = fmaxf(highest,
                        fmaxf(scores_[4 * column + 2 * half], scores_[4 * column + 2 * half + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      // No key yet: -infinity minus -infinity would be NaN.
      m[half] = highest == -HUGE_VALF ? 0.0f : __fmul_rn(highest, scale_);
      rescale_[half] = fast_exp2(__fsub_rn(__fmul_rn(max_[half], scale_), m[half]));
      max_[half] = highest;
      huge |= fabsf(m[half]) > huge_score;
    }
    if (__any_sync(~0u, huge)) {
      exponentiate<true>(m);
    } else {
      exponentiate<false>(m);
    }
  }

  template <bool any_huge>
  __device__ void exponentiate(const float (&m)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool huge = any_huge && fabsf(m[half]) > huge_score;
      float sum = sum_[half] * rescale_[half];
#pragma unroll
      for (int column = 0; column < Tile::keys / 8; ++column) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          float& score = scores_[4 * column + i];
          // m is a rounded product: where its rounding is large, the score's must be the same.
          score = fast_exp2(huge ? __fsub_rn(__fmul_rn(score, scale_), m[half])
                                 : fmaf(score, scale_, -m[half]));
          sum += score;
        }
      }
      sum_[half] = sum;
    }
  }

  __device__ void mask(const Walk& walk) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t query = walk.query_at(row_[half]);
      const KeyColumns seen = walk.columns(query);
#pragma unroll
      for (int column = 0; column < Tile::keys / 8; ++column) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = column * 8 + thread_ % 4 * 2 + i;
          float& score = scores_[4 * column + 2 * half + i];
          if (!seen.contain(key)) {
            score = -HUGE_VALF;
          } else if constexpr (Policy::changes_scores) {
            score =
                policy_.score(__fmul_rn(score, work_.scale_log2), query, walk.first_key() + key);
          }
        }
      }
    }
  }

  __device__ void rescale() {
    // Maxima move rarely once many keys are seen. NaN counts as a move.
    if (!__any_sync(~0u, !(rescale_[0] == 1.0f && rescale_[1] == 1.0f))) return;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) acc_[i] *= rescale_[i / 2 % 2];
  }

  __device__ void pack_probabilities() {
#pragma unroll
    for (int step = 0; step < Tile::keys / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        probabilities_[step][i] = pack<T>(scores_[8 * step + 2 * i], scores_[8 * step + 2 * i + 1]);
      }
    }
  }

  __device__ void write_state(const QueryItem& chunk) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = sum_[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (tile_.first_row + row_[half] >= chunk.tokens) continue;
      const std::int64_t at = (tile_.first_row + row_[half]) * work_.heads + tile_.head;
      if (thread_ % 4 == 0) {
        const float highest = max_[half];
        chunk.m[at] = highest == -HUGE_VALF ? highest : __fmul_rn(highest, scale_);
        chunk.l[at] = sum;
      }
      float* acc = chunk.acc + at * D + thread_ % 4 * 2;
#pragma unroll
      for (int column = 0; column < D / 8; ++column) {
        *reinterpret_cast<float2*>(acc + column * 8) =
            make_float2(acc_[4 * column + 2 * half], acc_[4 * column + 2 * half + 1]);
      }
    }
  }

  const AttentionWork& work_;
  const Policy policy_;
  const QueryTile& tile_;
  const HopperShared<D>& shared_;
  const int number_;  // of this consumer
  const int thread_;  // in the warpgroup
  int row_[2];        // of this thread, in the query tile
  float scale_ = 1;
  float scores_[Tile::keys / 2];
  std::uint32_t probabilities_[Tile::keys / 16][4];
  float acc_[D / 2] = {};
  float max_[2] = {-HUGE_VALF, -HUGE_VALF};  // of the unscaled scores
  float sum_[2] = {};
  float rescale_[2];
};

template <class T, int D, class Policy>
__global__ void __launch_bounds__(HopperTile<D>::threads, 1)
    attention_hopper_kernel(const __grid_constant__ AttentionWork work,
                            const __grid_constant__ HopperMaps maps) {
  using Tile = HopperTile<D>;
  extern __shared__ char memory[];
  __shared__ QueryTile tile;
  __shared__ alignas(8) std::uint64_t barriers[1 + 4 * Tile::stages];
  if (work.non_finite != nullptr && *work.non_finite != 0) return;  // the portable kernel's
  constexpr std::uint32_t alignment = Tile::alignment;
  const HopperShared<D> shared{(shared_address(memory) + alignment - 1) / alignment * alignment,
                               shared_address(barriers)};
  if (threadIdx.x == 0) {
    tile = query_tile<Tile::queries>(work, blockIdx.x);
    shared.init_barriers();
  }
  __syncthreads();
  const int warpgroup = static_cast<int>(threadIdx.x) / Tile::warpgroup;
  if (warpgroup == 0) {
    give_registers<Tile::producer_registers>();
    if (threadIdx.x == 0) produce<D, Policy>(work, maps, tile, shared);
  } else {
    take_registers<Tile::consumer_registers>();
    HopperConsumer<T, D, Policy>(work, tile, shared, warpgroup - 1).run();
  }
}

}  // namespace stream_cqsa::cuda
