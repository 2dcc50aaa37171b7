#include "cuda/attention_mma_launch.cuh"

namespace stream_cqsa::cuda {

void launch_attention_bf16(const AttentionWork& work, cudaStream_t stream,
                           std::int64_t shared_bytes) {
  launch_mma<__nv_bfloat16, CausalPolicy>(work, stream, shared_bytes);
}

}  // namespace stream_cqsa::cuda
