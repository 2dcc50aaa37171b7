// The choice of the portable kernel for a head dimension and a device, and its launch.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/attention_mma.cuh"
#include "cuda/attention_mma.hpp"
#include "cuda/check.hpp"

namespace stream_cqsa::cuda {

/// Whether a multiprocessor with `shared_bytes` holds as many blocks as the tile is made for.
template <class Tile>
bool fits(std::int64_t shared_bytes) {
  constexpr std::int64_t reserved = 2048;  // by CUDA, and for the block's query tile
  return Tile::blocks_per_sm * (Tile::shared_bytes + reserved) <= shared_bytes;
}

/// Calls `use` with the padded head dimension and the keys of a tile.
template <class Use>
auto with_mma_tile(std::int64_t dim, std::int64_t shared_bytes, Use use) {
  return with_padded_dim(dim, [&](auto padded) {
    using Keys = MmaKeys<padded()>;
    using Large = std::integral_constant<int, Keys::large>;
    using Small = std::integral_constant<int, Keys::small>;
    if (fits<MmaTile<padded(), Keys::large>>(shared_bytes)) return use(padded, Large());
    return use(padded, Small());
  });
}

template <class T, int D, int Keys, class Policy>
void launch_mma_kernel(const AttentionWork& work, cudaStream_t stream) {
  using Tile = MmaTile<D, Keys>;
  const std::int64_t blocks = work.tiles * work.heads;
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int>::max()) {
    throw Error("attention: a subproblem of more than 2^31 query tiles; divide it further");
  }
  const auto kernel = attention_mma_kernel<T, D, Keys, Policy>;
  STREAM_CQSA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              Tile::shared_bytes));
  kernel<<<static_cast<unsigned>(blocks), Tile::threads, Tile::shared_bytes, stream>>>(work);
  STREAM_CQSA_CUDA_CHECK(cudaGetLastError());
}

template <class T, class Policy>
void launch_mma(const AttentionWork& work, cudaStream_t stream, std::int64_t shared_bytes) {
  with_mma_tile(work.dim, shared_bytes, [&](auto dim, auto keys) {
    launch_mma_kernel<T, dim(), keys(), Policy>(work, stream);
  });
}

}  // namespace stream_cqsa::cuda
