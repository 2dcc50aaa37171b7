// The Hopper kernel with the tests' policy.
#include "attention_policy.cuh"
#include "cuda/attention_hopper_launch.cuh"

namespace stream_cqsa::testing {
namespace {

template <class T>
void launch(const cuda::AttentionWork& work, cudaStream_t stream) {
  using namespace cuda;
  if (work.dim == 64) return launch_hopper_kernel<T, HopperTile<64>, WindowPolicy>(work, stream);
  if (work.dim == 128) return launch_hopper_kernel<T, HopperTile<128>, WindowPolicy>(work, stream);
  launch_hopper_kernel<T, HopperTile<256>, WindowPolicy>(work, stream);
}

}  // namespace

void launch_window_hopper(DType type, const cuda::AttentionWork& work, cudaStream_t stream) {
  if (type == DType::f16) return launch<__half>(work, stream);
  launch<__nv_bfloat16>(work, stream);
}

}  // namespace stream_cqsa::testing
