#include "cuda/attention_hopper.hpp"
#include "cuda/attention_hopper_launch.cuh"
#include "cuda/check.hpp"

namespace stream_cqsa::cuda {
namespace {

template <class T>
void launch(const AttentionWork& work, cudaStream_t stream) {
  with_padded_dim(work.dim, [&]<int Dim>(std::integral_constant<int, Dim>) {
    launch_hopper_kernel<T, HopperTile<Dim>, CausalPolicy>(work, stream);
  });
}

template <class T>
__global__ void find_non_finite_kernel(const __grid_constant__ AttentionWork work) {
  const std::int64_t threads = std::int64_t{gridDim.x} * blockDim.x;
  bool found = false;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Each lane looks at another item: small chunks have thousands of pairs, and few are partial.
  for (std::int64_t first = 0; first < work.key_count; first += 32) {
    const bool own = first + lane < work.key_count && work.keys[first + lane].partial;
    for (unsigned partial = __ballot_sync(~0u, own); partial != 0; partial &= partial - 1) {
      const KeyItem& keys = work.keys[first + __ffs(static_cast<int>(partial)) - 1];
      const auto* v = static_cast<const uint4*>(keys.v);
      const std::int64_t count = keys.tokens * work.kv_heads * work.dim / 8;
      for (std::int64_t at = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < count;
           at += threads) {
        const uint4 eight = v[at];
        for (const std::uint32_t two : {eight.x, eight.y, eight.z, eight.w}) {
          constexpr std::uint32_t low = Format<T>::exponent;
          constexpr std::uint32_t high = low << 16;
          found |= (two & low) == low || (two & high) == high;
        }
      }
    }
  }
  if (found) *work.non_finite = 1;
}

}  // namespace

bool hopper_computes(DType storage, std::int64_t dim) {
  if (storage == DType::f32 || dim > 256) return false;
  int device = 0, major = 0, minor = 0;
  STREAM_CQSA_CUDA_CHECK(cudaGetDevice(&device));
  STREAM_CQSA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STREAM_CQSA_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
}

AttentionTile attention_hopper_tile(std::int64_t dim) {
  return with_padded_dim(dim, []<int Dim>(std::integral_constant<int, Dim>) -> AttentionTile {
    return {HopperTile<Dim>::queries, HopperTile<Dim>::keys};
  });
}

void launch_attention_hopper(DType storage, const AttentionWork& work, cudaStream_t stream) {
  if (storage == DType::f16) return launch<__half>(work, stream);
  launch<__nv_bfloat16>(work, stream);
}

void launch_find_non_finite(DType storage, const AttentionWork& work, cudaStream_t stream) {
  STREAM_CQSA_CUDA_CHECK(cudaMemsetAsync(work.non_finite, 0, sizeof(int), stream));
  constexpr int blocks = 1024, threads = 256;
  if (storage == DType::f16) {
    find_non_finite_kernel<__half><<<blocks, threads, 0, stream>>>(work);
  } else {
    find_non_finite_kernel<__nv_bfloat16><<<blocks, threads, 0, stream>>>(work);
  }
  STREAM_CQSA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace stream_cqsa::cuda
