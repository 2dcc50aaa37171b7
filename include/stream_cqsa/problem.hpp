// The attention problem: its shape, its mask, and which scores the mask keeps.
#pragma once

#include <cmath>
#include <cstdint>

#include "stream_cqsa/dtype.hpp"
#include "stream_cqsa/range.hpp"

namespace stream_cqsa {

enum class Mask {
  none,
  /// Bottom-right aligned for the whole query sequence: its row i sees key j <=
  /// i + key_length - its length.
  causal,
};

/// What the mask leaves of a block of scores.
enum class Liveness {
  dead,     ///< nothing: never loaded for, never computed
  full,     ///< everything: computed with no mask code
  partial,  ///< something: masked inside the kernel
};

/// O = softmax(scale * Q K^T + mask) V for every batch entry and query head.
///
/// Q and O are [batch, query_length, query_heads, head_dim]; K and V are
/// [batch, key_length, kv_heads, head_dim]. Query head h reads key/value head
/// h / (query_heads / kv_heads).
///
/// Q may be some rows of a longer sequence. These are then all that is read, computed and written,
/// and numbered from 0; only the mask asks what of the sequence is before and behind them.
///
/// Example: rows 5 and 6 of 10, causal, with 10 keys. query_length is 2, queries_before 5 and
/// queries_after 3; query 0 sees 6 keys.
struct Problem {
  std::int64_t batch = 1;
  std::int64_t query_heads = 1;
  std::int64_t kv_heads = 1;
  std::int64_t query_length = 0;
  std::int64_t key_length = 0;
  std::int64_t head_dim = 0;
  DType dtype = DType::f32;         ///< of Q, K and V as given
  DType output_dtype = DType::f32;  ///< of O
  Mask mask = Mask::none;
  double scale = 0;  ///< natural-base score scale, usually 1 / sqrt(head_dim)
  /// Rows of the query sequence before the first of Q and behind the last.
  std::int64_t queries_before = 0;
  std::int64_t queries_after = 0;

  std::int64_t query_heads_per_kv_head() const { return query_heads / kv_heads; }

  /// Rows of the query sequence that Q is, or is a part of.
  std::int64_t sequence_length() const { return queries_before + query_length + queries_after; }

  /// A causal mask lets query row i see key j where j <= i + causal_shift().
  std::int64_t causal_shift() const { return key_length - query_length - queries_after; }

  /// One past the last key that query row `query` sees; 0 or less where it sees none.
  std::int64_t visible_keys(std::int64_t query) const {
    if (mask == Mask::none) return key_length;
    return query + 1 + causal_shift();
  }

  /// What the mask leaves of the scores between `queries` and `keys` (empty ranges are dead).
  Liveness liveness(Range queries, Range keys) const;

  /// Whether any of these query rows sees a key.
  bool sees_keys(Range queries) const {
    return liveness(queries, {0, key_length}) != Liveness::dead;
  }

  /// How many (query, key) scores of one head the mask keeps between `queries` and `keys`.
  /// Closed form, exact for every problem that validate() accepts.
  std::int64_t live_scores(Range queries, Range keys) const;

  friend bool operator==(const Problem&, const Problem&) = default;
};

/// Throws InputError with one line unless every extent is at least 1, the rows before and after are
/// not negative, kv_heads divides query_heads, head_dim is at most 256, scale is finite, each
/// tensor (and the whole query sequence) has at most 2^48 elements and there are at most 2^62
/// scores a head, 2^63 in all (counted unsigned), so that no offset or count can overflow 64 bits.
void validate(const Problem& problem);

inline double default_scale(std::int64_t head_dim) {
  return 1.0 / std::sqrt(static_cast<double>(head_dim));
}

/// The key/value heads that are computed together, with all of their query heads.
struct HeadGroup {
  std::int64_t first = 0;  ///< first key/value head
  std::int64_t count = 0;  ///< key/value heads

  Range kv_heads() const { return {first, first + count}; }
  Range query_heads(const Problem& problem) const {
    const std::int64_t ratio = problem.query_heads_per_kv_head();
    return {first * ratio, (first + count) * ratio};
  }
  friend bool operator==(const HeadGroup&, const HeadGroup&) = default;
};

}  // namespace stream_cqsa
