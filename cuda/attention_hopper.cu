#include <array>
#include <limits>
#include <type_traits>

#include "cuda/attention_hopper.cuh"
#include "cuda/attention_hopper.hpp"
#include "cuda/check.hpp"

namespace stream_cqsa::cuda {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// A function of the driver, which the program is not linked with.
EncodeTiled encode_tiled() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  STREAM_CQSA_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                          cudaEnableDefault, &result));
#else
  STREAM_CQSA_CUDA_CHECK(
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result));
#endif
  if (entry == nullptr) throw Error("the CUDA driver has no cuTensorMapEncodeTiled; update it");
  return reinterpret_cast<EncodeTiled>(entry);
}

/// A pool of slots as a tensor [slot][token][head][dim], of which boxes of `rows` tokens and 64
/// elements of one head are copied.
CUtensorMap tensor_map(const SlotPool& pool, std::int64_t heads, std::int64_t dim, int rows,
                       CUtensorMapDataType type) {
  static const EncodeTiled encode = encode_tiled();
  const auto extent = [](std::int64_t value) { return static_cast<cuuint64_t>(value); };
  const std::array<cuuint64_t, 4> extents = {extent(dim), extent(heads), extent(pool.tokens),
                                             extent(pool.slots)};
  const std::array<cuuint64_t, 3> strides = {extent(2 * dim), extent(2 * dim * heads),
                                             extent(pool.slot_bytes)};
  const std::array<cuuint32_t, 4> box = {64, 1, static_cast<cuuint32_t>(rows), 1};
  const std::array<cuuint32_t, 4> steps = {1, 1, 1, 1};
  CUtensorMap map{};
  const CUresult result =
      encode(&map, type, 4, pool.base, extents.data(), strides.data(), box.data(), steps.data(),
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw Error("cuTensorMapEncodeTiled refuses the arena's slots");
  return map;
}

template <class T, int D>
void launch_kernel(const AttentionWork& work, cudaStream_t stream) {
  using Tile = HopperTile<D>;
  const std::int64_t blocks = work.tiles * work.heads;
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int>::max()) {
    throw Error("attention: a subproblem of more than 2^31 query tiles; divide it further");
  }
  constexpr auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  SlotPool keys_and_values = work.key_pool;
  keys_and_values.slots *= 2;
  keys_and_values.slot_bytes /= 2;
  const HopperMaps maps{tensor_map(work.query_pool, work.heads, D, Tile::queries, type),
                        tensor_map(keys_and_values, work.kv_heads, D, Tile::keys, type)};
  const auto kernel = attention_hopper_kernel<T, D, CausalPolicy>;
  STREAM_CQSA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              Tile::shared_bytes));
  kernel<<<static_cast<unsigned>(blocks), Tile::threads, Tile::shared_bytes, stream>>>(work, maps);
  STREAM_CQSA_CUDA_CHECK(cudaGetLastError());
}

template <class T>
void launch(const AttentionWork& work, cudaStream_t stream) {
  if (work.dim == 64) return launch_kernel<T, 64>(work, stream);
  launch_kernel<T, 128>(work, stream);
}

template <class T>
__global__ void find_non_finite_kernel(const __grid_constant__ AttentionWork work) {
  const std::int64_t threads = std::int64_t{gridDim.x} * blockDim.x;
  bool found = false;
  for (std::int64_t item = 0; item < work.key_count; ++item) {
    const KeyItem& keys = work.keys[item];
    if (!keys.partial) continue;
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
  if (found) *work.non_finite = 1;
}

}  // namespace

bool hopper_computes(DType storage, std::int64_t dim) {
  if (storage == DType::f32 || (dim != 64 && dim != 128)) return false;
  int device = 0, major = 0, minor = 0;
  STREAM_CQSA_CUDA_CHECK(cudaGetDevice(&device));
  STREAM_CQSA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STREAM_CQSA_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
}

AttentionTile attention_hopper_tile(std::int64_t dim) {
  if (dim == 64) return {HopperTile<64>::queries, HopperTile<64>::keys};
  return {HopperTile<128>::queries, HopperTile<128>::keys};
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
