// NaN and infinity in V, in tiles that the mask cuts through.
#pragma once

#include <cstdint>

#include "cuda/mma.cuh"

namespace stream_cqsa::cuda {

template <class T>
__device__ bool is_finite(std::uint32_t bits) {
  return (bits & Format<T>::exponent) != Format<T>::exponent;
}

/// Whether a tile of V has NaN or infinity, the same answer for all threads of the block.
/// value: [Tile::keys][D], rows of Tile::row_bytes
template <class T, class Tile>
__device__ bool any_non_finite(const char* value) {
  bool found = false;
#pragma unroll 1
  for (int at = threadIdx.x; at < Tile::keys * Tile::units; at += Tile::threads) {
    const uint4 unit = *reinterpret_cast<const uint4*>(value + at / Tile::units * Tile::row_bytes +
                                                       at % Tile::units * 16);
    for (const std::uint32_t pair : {unit.x, unit.y, unit.z, unit.w}) {
      found |= !is_finite<T>(pair) || !is_finite<T>(pair >> 16);
    }
  }
  return __syncthreads_or(found);
}

template <class T, class Tile>
__device__ void zero_non_finite(char* value) {
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < Tile::keys * Tile::units * 8; at += Tile::threads) {
    const int row = at / (Tile::units * 8);
    auto* element = reinterpret_cast<unsigned short*>(value + row * Tile::row_bytes);
    element += at % (Tile::units * 8);
    if (!is_finite<T>(*element)) *element = 0;
  }
  __syncthreads();
}

/// A hidden key has p = 0, and 0 times NaN or infinity is NaN: where a tile of V has such values,
/// they go by hand to the rows that see them, and are zero in the product.
///
/// acc: a thread's part of the rows from first_row on, see MmaAttention
template <class T, class Tile, class Walk, int Groups>
__device__ __forceinline__ void reveal_non_finite(float (&acc)[Tile::row_tiles][Groups][4],
                                                  char* value, const Walk& walk, int first_row,
                                                  int lane) {
#pragma unroll 1
  for (int key = 0; key < Tile::keys; ++key) {
    const auto* row =
        reinterpret_cast<const unsigned short*>(value + key * Tile::row_bytes) + lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < Tile::row_tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = first_row + tile * 16 + i / 2 * 8;
        if (!walk.columns(walk.query_at(query)).contain(key)) continue;
#pragma unroll
        for (int group = 0; group < Groups; ++group) {
          const std::uint32_t bits = row[group * 8 + i % 2];
          if (!is_finite<T>(bits)) acc[tile][group][i] += Format<T>::value(bits);
        }
      }
    }
  }
  zero_non_finite<T, Tile>(value);
}

}  // namespace stream_cqsa::cuda
