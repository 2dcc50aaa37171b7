#include "cuda/attention_fma.hpp"
#include "cuda/attention_fma_launch.cuh"

namespace stream_cqsa::cuda {

AttentionTile attention_fma_tile(std::int64_t dim) {
  return with_padded_dim(dim, [](auto padded) {
    using Tile = FmaTile<decltype(padded)::value>;
    return AttentionTile{Tile::queries, Tile::keys};
  });
}

void launch_attention_f32(const AttentionWork& work, cudaStream_t stream) {
  with_padded_dim(work.dim, [&](auto padded) {
    launch_fma_kernel<decltype(padded)::value, CausalPolicy>(work, stream);
  });
}

}  // namespace stream_cqsa::cuda
