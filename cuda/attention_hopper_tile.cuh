// What a block of the Hopper kernel computes at a time, and where it lies in shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/hopper.cuh"

namespace stream_cqsa::cuda {

/// How a consumer orders its products.
enum class Schedule {
  in_turn,  ///< a tile's scores, its softmax, its output
  beside  ///< a tile's output beside the next one's scores: weights stay in registers of their own
};

/// The shape of the tiles, by padded head dimension. Registers and shared memory bind; between what
/// fits analysis/kernel_notes.md decides.
template <int Dim>
struct HopperShape;

template <>
struct HopperShape<32> {
  static constexpr int consumers = 3;                     ///< warpgroups of 64 query rows
  static constexpr int keys = 176;                        ///< of a tile
  static constexpr int key_stages = 3, value_stages = 3;  ///< tiles of K, of V in shared memory
  static constexpr Schedule schedule = Schedule::in_turn;
};

template <>
struct HopperShape<64> : HopperShape<32> {};

template <>
struct HopperShape<96> {
  static constexpr int consumers = 3;
  static constexpr int keys = 144;
  static constexpr int key_stages = 2, value_stages = 2;
  static constexpr Schedule schedule = Schedule::in_turn;
};

template <>
struct HopperShape<128> {
  static constexpr int consumers = 2;
  static constexpr int keys = 160;
  static constexpr int key_stages = 2, value_stages = 2;
  static constexpr Schedule schedule = Schedule::beside;
};

template <>
struct HopperShape<256> : HopperShape<128> {
  static constexpr int keys = 80;
};

template <int Dim, class Shape = HopperShape<Dim>>
struct HopperTile : Shape {
  using Shape::consumers, Shape::keys, Shape::key_stages, Shape::value_stages;
  static constexpr int dim = Dim;
  static constexpr int queries = 64 * consumers;

  static constexpr int warpgroup = 128;
  static constexpr int threads = warpgroup * (1 + consumers);
  static constexpr int columns = (dim + 63) / 64;     ///< of 128 bytes
  static constexpr int query_column = queries * 128;  ///< bytes
  static constexpr int key_column = keys * 128;       ///< likewise
  static constexpr int query_bytes = columns * query_column;
  static constexpr int key_bytes = columns * key_column;  ///< of K, or V
  static constexpr int alignment = 1024;                  ///< of swizzled tiles
  static constexpr int shared_bytes =
      query_bytes + (key_stages + value_stages) * key_bytes + alignment;
  // 64K registers, in multiples of 8 a thread.
  static constexpr int producer_registers = consumers == 3 ? 32 : 24;
  static constexpr int consumer_registers = consumers == 3 ? 160 : 240;
  static_assert(consumers == 2 || consumers == 3);
  static_assert(keys % 16 == 0);
  static_assert(shared_bytes <= 226 * 1024);  // of 227 KiB, barriers too

  using Scores = float[keys / 2];  ///< of a thread
};

/// Q and K/V slots as tensors [slot][token][head][dim]; K and V count as slots of their own.
struct HopperMaps {
  CUtensorMap query, key;
};

/// What the producer tells consumers of a tile.
struct Ticket {
  int key;   ///< into AttentionWork::keys
  int code;  ///< the tile of the chunk; its complement where the mask or the chunk's end cuts it

  static constexpr int no_more = -2147483647 - 1;
  __device__ bool end() const { return code == no_more; }
  __device__ bool whole() const { return code >= 0; }
  __device__ int tile() const { return code >= 0 ? code : ~code; }
};

/// A block's shared memory and the barriers around its parts.
template <class Tile>
struct HopperShared {
  std::uint32_t base;      ///< Q, K stages, V stages; 1024-byte aligned
  std::uint32_t barriers;  ///< of Q full; then of each stage, K's first, full and empty
  Ticket* tickets;         ///< of the K stages, full with them

  static constexpr int barrier_count = 1 + 2 * (Tile::key_stages + Tile::value_stages);

  __device__ std::uint32_t query() const { return base; }
  __device__ std::uint32_t key(int stage) const {
    return base + Tile::query_bytes + stage * Tile::key_bytes;
  }
  __device__ std::uint32_t value(int stage) const { return key(Tile::key_stages + stage); }
  __device__ std::uint32_t query_full() const { return barriers; }
  __device__ std::uint32_t key_full(int stage) const { return barriers + 8 + 16 * stage; }
  __device__ std::uint32_t key_empty(int stage) const { return key_full(stage) + 8; }
  __device__ std::uint32_t value_full(int stage) const {
    return key_full(Tile::key_stages + stage);
  }
  __device__ std::uint32_t value_empty(int stage) const { return value_full(stage) + 8; }

  /// Tiles of K are given back by warps, those of V by warpgroups.
  __device__ void init_barriers() const {
    barrier_init(query_full(), 1);
    for (int stage = 0; stage < Tile::key_stages; ++stage) {
      barrier_init(key_full(stage), 1);
      barrier_init(key_empty(stage), 4 * Tile::consumers);
    }
    for (int stage = 0; stage < Tile::value_stages; ++stage) {
      barrier_init(value_full(stage), 1);
      barrier_init(value_empty(stage), Tile::consumers);
    }
    fence_barriers();
  }
};

/// Counts tiles through a ring of stages.
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

}  // namespace stream_cqsa::cuda
