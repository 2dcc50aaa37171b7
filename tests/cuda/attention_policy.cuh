// The policy of attention_policy.hpp, for the kernels.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention_policy.hpp"
#include "cuda/score_policy.cuh"

namespace stream_cqsa::testing {

struct WindowPolicy {
  static constexpr bool changes_scores = true;

  std::int64_t shift;

  explicit __device__ WindowPolicy(const cuda::AttentionWork& work) : shift(work.causal_shift) {}

  __device__ cuda::TokenRange keys_of(std::int64_t query) const {
    return {query + shift + 1 - window, query + shift + 1};
  }

  // NaN for a key that the window hides: no such score is to be asked for.
  __device__ float score(float s, std::int64_t query, std::int64_t key) const {
    const cuda::TokenRange seen = keys_of(query);
    if (key < seen.begin || key >= seen.end) return NAN;
    return softcap * tanhf(s / softcap);
  }
};

}  // namespace stream_cqsa::testing
