#include "attention_policy.hpp"
#include "cuda/attention_fma_launch.cuh"
#include "cuda/attention_mma_launch.cuh"

namespace stream_cqsa::testing {
namespace {

struct WindowPolicy {
  static constexpr bool changes_scores = true;

  std::int64_t shift;

  explicit __device__ WindowPolicy(const cuda::AttentionWork& work) : shift(work.causal_shift) {}

  __device__ cuda::TokenRange keys_of(std::int64_t query) const {
    return {query + shift + 1 - window, query + shift + 1};
  }

  // NaN for a key that the window hides: no such score is to be asked for.
  __device__ float score(float s, std::int64_t query, std::int64_t key) const {
    const cuda::TokenRange seen = keys_of(query);
    if (key < seen.begin || key >= seen.end) return NAN;
    return softcap * tanhf(s / softcap);
  }
};

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

template <int D>
std::vector<CaseKernel> kernels_of(DType type) {
  std::vector<CaseKernel> kernels;
  if (type == DType::f16) add_portable<__half, D>(kernels);
  if (type == DType::bf16) add_portable<__nv_bfloat16, D>(kernels);
  if (type == DType::f32) {
    kernels.push_back({"fma", cuda::FmaTile<D>::queries, cuda::launch_fma_kernel<D, WindowPolicy>});
  }
  return kernels;
}

}  // namespace

std::vector<CaseKernel> window_kernels(DType type, std::int64_t dim) {
  if (dim == 64) return kernels_of<64>(type);
  return dim == 128 ? kernels_of<128>(type) : kernels_of<256>(type);
}

}  // namespace stream_cqsa::testing
