// A policy that only the tests have: a sliding window and a softcap.
#pragma once

#include <array>
#include <cstdint>

#include "attention_launch.hpp"

namespace stream_cqsa::testing {

/// Keys before the query that it sees, itself included.
constexpr std::int64_t window = 150;
/// Scores in base 2 become cap * tanh(score / cap).
constexpr float softcap = 4.0f;

struct PolicyCase {
  DType type = DType::f16;
  std::int64_t dim = 64;
};

/// What has kernels with that policy: every type, and every tile of each kernel.
constexpr std::array policy_cases = {PolicyCase{DType::f16, 64}, PolicyCase{DType::bf16, 128},
                                     PolicyCase{DType::f16, 256}, PolicyCase{DType::f32, 64},
                                     PolicyCase{DType::f32, 128}};

/// The kernels of one of policy_cases, and of the portable one both tiles.
std::vector<CaseKernel> window_kernels(DType type, std::int64_t dim);

/// launch_attention_hopper() with that policy, in builds that have that kernel: of policy_cases,
/// those of 16 bits, by dim
void launch_window_hopper(const cuda::AttentionWork& work, cudaStream_t stream);

}  // namespace stream_cqsa::testing
