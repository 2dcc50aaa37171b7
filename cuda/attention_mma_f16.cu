#include "cuda/attention_mma_launch.cuh"

namespace stream_cqsa::cuda {

std::int64_t multiprocessor_shared_bytes() {
  int device = 0, bytes = 0;
  STREAM_CQSA_CUDA_CHECK(cudaGetDevice(&device));
  STREAM_CQSA_CUDA_CHECK(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  return bytes;
}

AttentionTile attention_mma_tile(std::int64_t dim, std::int64_t shared_bytes) {
  return with_mma_tile(dim, shared_bytes, [](auto padded, auto keys) {
    using Tile = MmaTile<padded(), keys()>;
    return AttentionTile{Tile::queries, Tile::keys};
  });
}

void launch_attention_f16(const AttentionWork& work, cudaStream_t stream,
                          std::int64_t shared_bytes) {
  launch_mma<__half, CausalPolicy>(work, stream, shared_bytes);
}

}  // namespace stream_cqsa::cuda
