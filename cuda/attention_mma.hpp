// The portable kernel's launchers, one per storage type.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/attention.hpp"

namespace stream_cqsa::cuda {

/// Shared memory of a multiprocessor of the current device, in bytes.
std::int64_t multiprocessor_shared_bytes();

/// Shared memory decides how many keys a tile has: the more, the fewer tiles. The smallest tiles
/// run on every device, those of `shared_bytes` = 0.
AttentionTile attention_mma_tile(std::int64_t dim,
                                 std::int64_t shared_bytes = multiprocessor_shared_bytes());
void launch_attention_f16(const AttentionWork& work, cudaStream_t stream,
                          std::int64_t shared_bytes = multiprocessor_shared_bytes());
void launch_attention_bf16(const AttentionWork& work, cudaStream_t stream,
                           std::int64_t shared_bytes = multiprocessor_shared_bytes());

}  // namespace stream_cqsa::cuda
