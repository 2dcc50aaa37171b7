// What happens to a score between the product and the softmax: the kernels' one policy parameter.
#pragma once

#include <cstdint>

#include "cuda/attention.hpp"

namespace stream_cqsa::cuda {

/// Bottom-right aligned causal mask; without a mask no pair is partial and it is never asked.
///
/// Another mask or change of scores is another type with these members. All tokens are positions in
/// the sequence.
struct CausalPolicy {
  std::int64_t shift;

  explicit __device__ CausalPolicy(const AttentionWork& work) : shift(work.causal_shift) {}

  /// One past the last of the keys from `first_key` on, of `keys`, that any query up to
  /// `last_query` sees, counted from `first_key`.
  __device__ std::int64_t visible_end(std::int64_t last_query, std::int64_t first_key,
                                      std::int64_t keys) const {
    const std::int64_t end = last_query + shift + 1 - first_key;
    return end < 0 ? 0 : end < keys ? end : keys;
  }

  /// The same for what every query from `first_query` on sees.
  __device__ std::int64_t whole_end(std::int64_t first_query, std::int64_t first_key,
                                    std::int64_t keys) const {
    return visible_end(first_query, first_key, keys);
  }

  /// Whether every query from `first_query` on sees every key before `end_key`.
  __device__ bool keeps_all(std::int64_t first_query, std::int64_t end_key) const {
    return end_key <= first_query + shift + 1;
  }

  /// How many of `keys` keys from `first_key` on the query sees.
  __device__ int visible_keys(std::int64_t query, std::int64_t first_key, int keys) const {
    return static_cast<int>(visible_end(query, first_key, keys));
  }
};

}  // namespace stream_cqsa::cuda
