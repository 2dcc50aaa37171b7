#include "attention_policy.cuh"
#include "attention_policy.hpp"
#include "cuda/attention_fma_launch.cuh"
#include "cuda/attention_hopper.hpp"
#include "cuda/attention_mma_launch.cuh"

namespace stream_cqsa::testing {
namespace {

template <class T, int D>
void add_portable(std::vector<CaseKernel>& kernels) {
  using Keys = cuda::MmaKeys<D>;
  const auto add = [&]<int K>(std::integral_constant<int, K> keys) {
    if (!cuda::fits<cuda::MmaTile<D, K>>(cuda::multiprocessor_shared_bytes())) return;
    kernels.push_back({"mma, keys " + std::to_string(keys()), cuda::MmaTile<D, K>::queries,
                       cuda::launch_mma_kernel<T, D, K, WindowPolicy>});
  };
  add(std::integral_constant<int, Keys::large>());
  add(std::integral_constant<int, Keys::small>());
}

// As launch_attention() does: where V is not finite the portable kernel takes over.
#if defined(STREAM_CQSA_TEST_HOPPER)
template <class T, int D>
void add_hopper(DType type, std::vector<CaseKernel>& kernels) {
  if (cuda::attention_kernel(type, D) != "Hopper") return;
  const auto launch = [type](const cuda::AttentionWork& work, cudaStream_t stream) {
    cuda::launch_find_non_finite(type, work, stream);
    launch_window_hopper(work, stream);
    cuda::AttentionWork portable = work;
    portable.queries = work.portable_queries;
    portable.tiles = work.portable_tiles;
    cuda::launch_mma_kernel<T, D, cuda::MmaKeys<D>::large, WindowPolicy>(portable, stream);
  };
  kernels.push_back({"Hopper", cuda::attention_tile(type, D).queries, launch, true});
}
#else
template <class T, int D>
void add_hopper(DType, std::vector<CaseKernel>&) {}
#endif

template <class T, int D>
std::vector<CaseKernel> kernels_of(DType type) {
  std::vector<CaseKernel> kernels;
  add_portable<T, D>(kernels);
  add_hopper<T, D>(type, kernels);
  return kernels;
}

template <int D>
std::vector<CaseKernel> kernels_of_f32() {
  return {{"fma", cuda::FmaTile<D>::queries, cuda::launch_fma_kernel<D, WindowPolicy>}};
}

}  // namespace

std::vector<CaseKernel> window_kernels(DType type, std::int64_t dim) {
  if (type == DType::f32) return dim == 64 ? kernels_of_f32<64>() : kernels_of_f32<128>();
  if (dim == 128) return kernels_of<__nv_bfloat16, 128>(type);
  return dim == 64 ? kernels_of<__half, 64>(type) : kernels_of<__half, 256>(type);
}

}  // namespace stream_cqsa::testing
