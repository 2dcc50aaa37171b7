// The float32 kernel and its launcher.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/attention.hpp"

namespace stream_cqsa::cuda {

AttentionTile attention_fma_tile(std::int64_t dim);
void launch_attention_f32(const AttentionWork& work, cudaStream_t stream);

}  // namespace stream_cqsa::cuda
