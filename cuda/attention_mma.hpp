// The portable kernel's launchers, one per storage type.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/attention.hpp"

namespace stream_cqsa::cuda {

AttentionTile attention_mma_tile(std::int64_t dim);
void launch_attention_f16(const AttentionWork& work, cudaStream_t stream);
void launch_attention_bf16(const AttentionWork& work, cudaStream_t stream);

}  // namespace stream_cqsa::cuda
