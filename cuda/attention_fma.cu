#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/attention_fma.cuh"
#include "cuda/attention_fma.hpp"
#include "cuda/check.hpp"

namespace stream_cqsa::cuda {
namespace {

// Calls `use` with the smallest padded head dimension that holds `dim`, as a type.
template <class Use>
auto with_padded_dim(std::int64_t dim, Use use) {
  if (dim <= 32) return use(std::integral_constant<int, 32>());
  if (dim <= 64) return use(std::integral_constant<int, 64>());
  if (dim <= 96) return use(std::integral_constant<int, 96>());
  if (dim <= 128) return use(std::integral_constant<int, 128>());
  return use(std::integral_constant<int, 256>());
}

template <int D>
void launch_kernel(const AttentionWork& work, cudaStream_t stream) {
  constexpr std::int64_t most = std::numeric_limits<int>::max();  // beyond it blocks loop
  const std::int64_t blocks = std::min(work.tiles * work.heads, most);
  if (blocks == 0) return;
  const auto kernel = attention_fma_kernel<D, CausalPolicy>;
  STREAM_CQSA_CUDA_CHECK(cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, FmaTile<D>::shared_bytes));
  kernel<<<static_cast<unsigned>(blocks), FmaTile<D>::threads, FmaTile<D>::shared_bytes, stream>>>(
      work);
  STREAM_CQSA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

AttentionTile attention_fma_tile(std::int64_t dim) {
  return with_padded_dim(dim, [](auto padded) {
    using Tile = FmaTile<decltype(padded)::value>;
    return AttentionTile{Tile::queries, Tile::keys};
  });
}

void launch_attention_f32(const AttentionWork& work, cudaStream_t stream) {
  with_padded_dim(work.dim, [&](auto padded) {
    launch_kernel<decltype(padded)::value>(work, stream);
  });
}

}  // namespace stream_cqsa::cuda
