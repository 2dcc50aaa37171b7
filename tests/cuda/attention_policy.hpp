// A policy that only the tests have: a sliding window and a softcap.
#pragma once

#include <cstdint>

#include "attention_launch.hpp"

namespace stream_cqsa::testing {

/// Keys before the query that it sees, itself included.
constexpr std::int64_t window = 150;
/// Scores in base 2 become cap * tanh(score / cap).
constexpr float softcap = 4.0f;

/// The kernels with that policy, and of the portable one both tiles. dim: 64, 128 or 256
std::vector<CaseKernel> window_kernels(DType type, std::int64_t dim);

/// launch_attention_hopper() with that policy, in builds that have that kernel. dim: as above
void launch_window_hopper(DType type, const cuda::AttentionWork& work, cudaStream_t stream);

}  // namespace stream_cqsa::testing
