// What happens to a score between the product and the softmax: the kernels' one policy parameter.
#pragma once

#include <cstdint>

#include "cuda/attention.hpp"

namespace stream_cqsa::cuda {

/// Positions in the sequence, from `begin` to before `end`.
struct TokenRange {
  std::int64_t begin, end;
};

/// Bottom-right aligned causal mask; without a mask no pair is partial and it is never asked.
///
/// Another mask (windows, documents) or change of scores (bias, softcap) is another type with these
/// members. It is asked about the tokens of the launch's chunks alone, and about keys only where
/// the pair is partial.
struct CausalPolicy {
  /// If true the type has a member `float score(float s, std::int64_t query, std::int64_t key)
  /// const`, which is asked for every pair of tokens that the mask keeps. Scores are in base 2, its
  /// argument scale * log2(e) * q.k.
  static constexpr bool changes_scores = false;

  std::int64_t shift;

  explicit __device__ CausalPolicy(const AttentionWork& work) : shift(work.causal_shift) {}

  /// The keys that a query sees. Neither end of the range decreases with the query.
  __device__ TokenRange keys_of(std::int64_t query) const { return {INT64_MIN, query + shift + 1}; }
};

}  // namespace stream_cqsa::cuda
