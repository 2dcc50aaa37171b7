// The Hopper kernel's launcher.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/attention.hpp"

namespace stream_cqsa::cuda {

/// Whether the current device and this build have the kernel for the storage type and dimension.
bool hopper_computes(DType storage, std::int64_t dim);

AttentionTile attention_hopper_tile(std::int64_t dim);

/// Launches the kernel; AttentionWork::query_pool and key_pool must be given. The V rows between a
/// chunk's end and the next multiple of the tile's keys, as far as the pool has them, must be
/// finite. In a pair that the mask cuts NaN and infinity in V would reach rows that do not see
/// them: where the flag AttentionWork::non_finite is set nothing is computed.
void launch_attention_hopper(DType storage, const AttentionWork& work, cudaStream_t stream);

/// Sets the flag AttentionWork::non_finite to whether the V of any partial pair holds NaN or
/// infinity.
void launch_find_non_finite(DType storage, const AttentionWork& work, cudaStream_t stream);

}  // namespace stream_cqsa::cuda
