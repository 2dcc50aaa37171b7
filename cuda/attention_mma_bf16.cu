#include "cuda/attention_mma_launch.cuh"

namespace stream_cqsa::cuda {

void launch_attention_bf16(const AttentionWork& work, cudaStream_t stream) {
  launch_mma<__nv_bfloat16>(work, stream);
}

}  // namespace stream_cqsa::cuda
