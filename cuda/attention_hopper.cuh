// The kernel for compute capability 9.0a, f16 and bf16.
//
// A block computes one query tile of one query head. A producer warpgroup feeds shared memory by
// tensor copies; each consumer warpgroup owns 64 query rows, and the softmax of one runs beside the
// products of the others. Structure as in FlashAttention-3 (arXiv 2407.08608).
#pragma once

#include <cstdint>

#include "cuda/attention.hpp"
#include "cuda/attention_hopper_softmax.cuh"
#include "cuda/attention_hopper_tile.cuh"
#include "cuda/hopper.cuh"
#include "cuda/mma.cuh"
#include "cuda/score_policy.cuh"
#include "cuda/tiles.cuh"
#include "cuda/wgmma.cuh"

namespace stream_cqsa::cuda {

/// Copies Q, then the tiles of K and V, by one thread.
template <class Tile, class Policy>
__device__ void produce(const AttentionWork& work, const HopperMaps& maps, const QueryTile& tile,
                        const HopperShared<Tile>& shared) {
  const QueryItem& chunk = work.queries[tile.item];
  barrier_expect(shared.query_full(), Tile::query_bytes);
  for (int column = 0; column < Tile::columns; ++column) {
    copy_box(shared.query() + column * Tile::query_column, maps.query, 64 * column,
             static_cast<int>(tile.head), static_cast<int>(tile.first_row),
             static_cast<int>(chunk.slot), shared.query_full());
  }
  const Policy policy(work);
  KeyWalk<Tile::keys, Tile::queries, Policy> walk(work, chunk, tile.first_token, policy);
  StageCounter<Tile::key_stages> key;
  StageCounter<Tile::value_stages> value;
  for (; !walk.done(); walk.next(), key.next(), value.next()) {
    const int slot = static_cast<int>(walk.keys->slot);
    const auto load = [&](std::uint32_t to, std::uint32_t full, int part) {
      barrier_expect(full, Tile::key_bytes);
      for (int column = 0; column < Tile::columns; ++column) {
        copy_box(to + column * Tile::key_column, maps.key, 64 * column,
                 static_cast<int>(tile.kv_head), walk.tile * Tile::keys, 2 * slot + part, full);
      }
    };
    barrier_wait(shared.key_empty(key.stage), key.parity ^ 1);
    shared.tickets[key.stage] = {static_cast<int>(walk.keys - work.keys),
                                 walk.whole() ? walk.tile : ~walk.tile};
    load(shared.key(key.stage), shared.key_full(key.stage), 0);
    barrier_wait(shared.value_empty(value.stage), value.parity ^ 1);
    load(shared.value(value.stage), shared.value_full(value.stage), 1);
  }
  barrier_wait(shared.key_empty(key.stage), key.parity ^ 1);
  shared.tickets[key.stage] = {0, Ticket::no_more};
  barrier_arrive(shared.key_full(key.stage));
}

template <class T, class Tile, class Policy>
class HopperConsumer {
 public:
  __device__ HopperConsumer(const AttentionWork& work, const QueryTile& tile,
                            const HopperShared<Tile>& shared, int number)
      : work_(work),
        tile_(tile),
        shared_(shared),
        number_(number),
        thread_(static_cast<int>(threadIdx.x) % Tile::warpgroup),
        softmax_(work, tile, number * 64 + thread_ / 32 * 16 + thread_ % 32 / 4) {}

  __device__ void run() {
    barrier_wait(shared_.query_full(), 0);
    prepare_query();
    if constexpr (Tile::schedule == Schedule::in_turn) {
      run_in_turn();
    } else {
      run_beside();
    }
    write_state();
  }

 private:
  static constexpr int dim = Tile::dim;
  using Scores = typename Tile::Scores;

  __device__ void run_in_turn() {
    Scores scores;
    if (number_ == 0) give_turn(0);
    take_turn();
    for (;;) {
      const Ticket ticket = take_ticket();
      if (ticket.end()) break;
      start_scores(scores);
      give_turn((number_ + 1) % Tile::consumers);
      wgmma_wait<0>();
      softmax(scores, ticket);
      softmax_.rescale(acc_);
      pack_weights(scores);
      take_turn();
      start_output();
      wgmma_wait<0>();
      release_value();
    }
    give_turn((number_ + 1) % Tile::consumers);
  }

  __device__ void run_beside() {
    Scores scores;
    Ticket ticket = take_ticket();
    if (ticket.end()) return;
    start_scores(scores);
    wgmma_wait<0>();
    softmax(scores, ticket);
    pack_weights(scores);
    if (number_ == 0) give_turn(0);
    for (;;) {
      ticket = take_ticket();
      if (ticket.end()) break;
      take_turn();
      start_scores(scores);
      start_output();
      give_turn((number_ + 1) % Tile::consumers);
      wgmma_wait<1>();
      softmax(scores, ticket);
      wgmma_wait<0>();
      release_value();
      softmax_.rescale(acc_);
      pack_weights(scores);
    }
    start_output();
    wgmma_wait<0>();
  }

  __device__ Ticket take_ticket() const {
    barrier_wait(shared_.key_full(key_.stage), key_.parity);
    return shared_.tickets[key_.stage];
  }

  // Consumers put their products on the tensor cores in turn: while one's run, the others' softmax
  // does. All have equally many tiles.
  __device__ static int turn(int consumer) { return 1 + Tile::consumers + consumer; }
  __device__ void take_turn() const { named_barrier_sync(turn(number_), 2 * Tile::warpgroup); }
  __device__ void give_turn(int consumer) const {
    named_barrier_arrive(turn(consumer), 2 * Tile::warpgroup);
  }

  __device__ void release_key() {
    if (thread_ % 32 == 0) barrier_arrive(shared_.key_empty(key_.stage));
    key_.next();
  }
  __device__ void release_value() {
    if (thread_ == 0) barrier_arrive(shared_.value_empty(value_.stage));
    value_.next();
  }

  /// Where the scale is not positive, as the portable kernel does.
  __device__ void prepare_query() {
    const bool zero = work_.scale_log2 == 0;
    if (Policy::changes_scores ? !zero : work_.scale_log2 > 0) return;
    // Where the maximum is taken before scaling, the sign goes into Q.
    for (int at = thread_; at < 64 * 64 * Tile::columns; at += Tile::warpgroup) {
      const std::uint32_t address = query(at / (64 * 64)) + at % (64 * 64) * 2;
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

  /// This consumer's rows of Q.
  __device__ std::uint32_t query(int column) const {
    return shared_.query() + column * Tile::query_column + number_ * 64 * 128;
  }

  /// scores = Q K^T.
  __device__ void start_scores(Scores& scores) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < dim / 16; ++step) {
      const int offset = step % 4 * 32;
      const std::uint32_t q = query(step / 4) + offset;
      const std::uint32_t k = shared_.key(key_.stage) + step / 4 * Tile::key_column + offset;
      Wgmma<T, Tile::keys / 2>::shared(scores, wgmma_descriptor(q, 0), wgmma_descriptor(k, 0),
                                       step > 0);
    }
    wgmma_commit();
  }

  /// acc += P V.
  __device__ void start_output() {
    barrier_wait(shared_.value_full(value_.stage), value_.parity);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tile::keys / 16; ++step) {
      const std::uint32_t v = shared_.value(value_.stage) + step * 16 * 128;
      Wgmma<T, dim / 2>::registers(acc_, weights_[step], wgmma_descriptor(v, Tile::key_column), 1);
    }
    wgmma_commit();
  }

  /// scores become weights; the tile of K goes back.
  __device__ void softmax(Scores& scores, const Ticket& ticket) {
    bool pending[2] = {true, true};
    const bool settled = softmax_.settled(ticket);
    if (!settled || !softmax_.weights_by_earlier_maximum(scores, pending)) {
      if (settled) recompute_scores(scores, pending);
      softmax_.weights(scores, ticket, pending);
    }
    release_key();
  }

  /// The scores of this warp's pending rows once more, without the other warps of its warpgroup.
  __device__ void recompute_scores(Scores& scores, const bool (&pending)[2]) const {
    const int lane = thread_ % 32;
    const int row = lane % 8;
    // Rows of 128 bytes, of which the swizzle exchanges the sixteenths.
    const auto sixteen_bytes = [=](int step, int half) {
      return ((step % 4 * 2 + half) ^ row) * 16;
    };
#pragma unroll
    for (int i = 0; i < Tile::keys / 2; ++i) scores[i] = pending[i / 2 % 2] ? 0 : scores[i];
#pragma unroll 1
    for (int step = 0; step < dim / 16; ++step) {
      std::uint32_t a[4];
      load_matrices(a, query(step / 4) + (thread_ / 32 * 16 + row + lane / 8 % 2 * 8) * 128 +
                           sixteen_bytes(step, lane / 16));
      const std::uint32_t k = shared_.key(key_.stage) + step / 4 * Tile::key_column +
                              (row + lane / 16 * 8) * 128 + sixteen_bytes(step, lane / 8 % 2);
#pragma unroll
      for (int pair = 0; pair < Tile::keys / 16; ++pair) {
        std::uint32_t b[4];
        load_matrices(b, k + pair * 16 * 128);
        float c[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = scores[8 * pair + i];
        multiply_add<T>(c[0], a, b[0], b[1]);
        multiply_add<T>(c[1], a, b[2], b[3]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (pending[i / 2 % 2]) scores[8 * pair + i] = c[i / 4][i % 4];
        }
      }
    }
  }

  __device__ void pack_weights(const Scores& scores) {
#pragma unroll
    for (int step = 0; step < Tile::keys / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights_[step][i] = pack<T>(scores[8 * step + 2 * i], scores[8 * step + 2 * i + 1]);
      }
    }
  }

  __device__ void write_state() const {
    const QueryItem& chunk = work_.queries[tile_.item];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float l = softmax_.sum(half);
      const std::int64_t token = tile_.first_row + softmax_.row(half);
      if (token >= chunk.tokens) continue;
      const std::int64_t at = token * work_.heads + tile_.head;
      if (thread_ % 4 == 0) {
        chunk.m[at] = softmax_.maximum(half);
        chunk.l[at] = l;
      }
      float* acc = chunk.acc + at * work_.dim + thread_ % 4 * 2;
#pragma unroll
      for (int column = 0; column < dim / 8; ++column) {
        if (column * 8 >= work_.dim) break;
        *reinterpret_cast<float2*>(acc + column * 8) =
            make_float2(acc_[4 * column + 2 * half], acc_[4 * column + 2 * half + 1]);
      }
    }
  }

  const AttentionWork& work_;
  const QueryTile& tile_;
  const HopperShared<Tile>& shared_;
  const int number_;  // of this consumer
  const int thread_;  // in the warpgroup
  StageCounter<Tile::key_stages> key_;
  StageCounter<Tile::value_stages> value_;
  HopperSoftmax<Tile, Policy> softmax_;
  std::uint32_t weights_[Tile::keys / 16][4];  // P, as products take it
  float acc_[dim / 2] = {};
};

template <class T, class Tile, class Policy>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_hopper_kernel(const __grid_constant__ AttentionWork work,
                            const __grid_constant__ HopperMaps maps) {
  extern __shared__ char memory[];
  __shared__ QueryTile tile;
  __shared__ alignas(8) std::uint64_t barriers[HopperShared<Tile>::barrier_count];
  __shared__ alignas(8) Ticket tickets[Tile::key_stages];
  if (work.non_finite != nullptr && *work.non_finite != 0) return;  // the portable kernel's
  constexpr std::uint32_t alignment = Tile::alignment;
  const HopperShared<Tile> shared{(shared_address(memory) + alignment - 1) / alignment * alignment,
                                  shared_address(barriers), tickets};
  bool stop = false;
  if (threadIdx.x == 0) {
    stop = cancelled(work);
    tile = query_tile<Tile::queries>(work, blockIdx.x);
    shared.init_barriers();
  }
  if (__syncthreads_or(stop)) return;
  // By a shuffle, so that it is known to be the same in a warp and lies in a uniform register.
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / Tile::warpgroup, 0);
  if (warpgroup == 0) {
    give_registers<Tile::producer_registers>();
    if (threadIdx.x == 0) produce<Tile, Policy>(work, maps, tile, shared);
  } else {
    take_registers<Tile::consumer_registers>();
    HopperConsumer<T, Tile, Policy>(work, tile, shared, warpgroup - 1).run();
  }
}

}  // namespace stream_cqsa::cuda
