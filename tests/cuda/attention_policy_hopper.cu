// The Hopper kernel with the tests' policy.
#include "attention_policy.cuh"
#include "cuda/attention_hopper_launch.cuh"

namespace stream_cqsa::testing {

void launch_window_hopper(const cuda::AttentionWork& work, cudaStream_t stream) {
  using namespace cuda;
  if (work.dim == 64)
    return launch_hopper_kernel<__half, HopperTile<64>, WindowPolicy>(work, stream);
  if (work.dim == 256)
    return launch_hopper_kernel<__half, HopperTile<256>, WindowPolicy>(work, stream);
  launch_hopper_kernel<__nv_bfloat16, HopperTile<128>, WindowPolicy>(work, stream);
}

}  // namespace stream_cqsa::testing
