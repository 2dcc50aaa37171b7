// Launching the Hopper kernel, for any tile and policy.
#pragma once

#include <array>
#include <limits>
#include <type_traits>

#include "cuda/attention_hopper.cuh"
#include "cuda/check.hpp"

namespace stream_cqsa::cuda {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// A function of the driver, which the program is not linked with.
inline EncodeTiled encode_tiled() {
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
inline CUtensorMap tensor_map(const SlotPool& pool, std::int64_t heads, std::int64_t dim, int rows,
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

template <class T, class Tile, class Policy>
void launch_hopper_kernel(const AttentionWork& work, cudaStream_t stream) {
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
  const HopperMaps maps{tensor_map(work.query_pool, work.heads, work.dim, Tile::queries, type),
                        tensor_map(keys_and_values, work.kv_heads, work.dim, Tile::keys, type)};
  const auto kernel = attention_hopper_kernel<T, Tile, Policy>;
  STREAM_CQSA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              Tile::shared_bytes));
  kernel<<<static_cast<unsigned>(blocks), Tile::threads, Tile::shared_bytes, stream>>>(work, maps);
  STREAM_CQSA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace stream_cqsa::cuda
