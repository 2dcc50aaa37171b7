#include "cuda/attention_mma_launch.cuh"

namespace stream_cqsa::cuda {

AttentionTile attention_mma_tile(std::int64_t dim) {
  return with_mma_tile(dim, [](auto padded, auto keys) {
    using Tile = MmaTile<padded(), keys()>;
    return AttentionTile{Tile::queries, Tile::keys};
  });
}

void launch_attention_f16(const AttentionWork& work, cudaStream_t stream) {
  launch_mma<__half>(work, stream);
}

}  // namespace stream_cqsa::cuda
