// The choice of a kernel for a head dimension and a device, and its launch.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/attention_mma.cuh"
#include "cuda/attention_mma.hpp"
#include "cuda/check.hpp"

namespace stream_cqsa::cuda {

/// Whether the current device's multiprocessors hold as many blocks as the tile is made for.
template <class Tile>
bool fits_device() {
  int device = 0, bytes = 0;
  STREAM_CQSA_CUDA_CHECK(cudaGetDevice(&device));
  STREAM_CQSA_CUDA_CHECK(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  constexpr int reserved = 2048;  // by CUDA, and for the block's query tile
  return Tile::blocks_per_sm * (Tile::shared_bytes + reserved) <= bytes;
}

/// Calls `use` with the dimension's tile and the padded dimension: the smallest that holds `dim`.
template <class Use>
auto with_mma_tile(std::int64_t dim, Use use) {
  const auto first_that_fits = [&](auto padded, auto large, auto small) {
    if (fits_device<MmaTile<padded(), large()>>()) return use(padded, large);
    return use(padded, small);
  };
  const auto with = [&]<int D, int Large, int Small>() {
    return first_that_fits(std::integral_constant<int, D>(), std::integral_constant<int, Large>(),
                           std::integral_constant<int, Small>());
  };
  if (dim <= 32) return with.template operator()<32, 64, 64>();
  if (dim <= 64) return with.template operator()<64, 64, 64>();
  if (dim <= 96) return with.template operator()<96, 64, 64>();
  if (dim <= 128) return with.template operator()<128, 64, 32>();
  return with.template operator()<256, 32, 16>();
}

template <class T, int D, int Keys>
void launch_mma_kernel(const AttentionWork& work, cudaStream_t stream) {
  using Tile = MmaTile<D, Keys>;
  const std::int64_t blocks = work.tiles * work.heads;
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int>::max()) {
    throw Error("attention: a subproblem of more than 2^31 query tiles; divide it further");
  }
  const auto kernel = attention_mma_kernel<T, D, Keys, CausalPolicy>;
  STREAM_CQSA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              Tile::shared_bytes));
  kernel<<<static_cast<unsigned>(blocks), Tile::threads, Tile::shared_bytes, stream>>>(work);
  STREAM_CQSA_CUDA_CHECK(cudaGetLastError());
}

template <class T>
void launch_mma(const AttentionWork& work, cudaStream_t stream) {
  with_mma_tile(work.dim,
                [&](auto dim, auto keys) { launch_mma_kernel<T, dim(), keys()>(work, stream); });
}

}  // namespace stream_cqsa::cuda
