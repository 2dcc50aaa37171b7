// The float32 kernel's launch, for any policy.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/attention_fma.cuh"
#include "cuda/check.hpp"

namespace stream_cqsa::cuda {

template <int D, class Policy>
void launch_fma_kernel(const AttentionWork& work, cudaStream_t stream) {
  constexpr std::int64_t most = std::numeric_limits<int>::max();  // beyond it blocks loop
  const std::int64_t blocks = std::min(work.tiles * work.heads, most);
  if (blocks == 0) return;
  const auto kernel = attention_fma_kernel<D, Policy>;
  STREAM_CQSA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              FmaTile<D>::shared_bytes));
  kernel<<<static_cast<unsigned>(blocks), FmaTile<D>::threads, FmaTile<D>::shared_bytes, stream>>>(
      work);
  STREAM_CQSA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace stream_cqsa::cuda
