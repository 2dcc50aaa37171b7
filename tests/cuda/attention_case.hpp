// A launch of attention as the tests see it: its input on the host, its run, and its definition.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "stream_cqsa/dtype.hpp"
#include "stream_cqsa/range.hpp"

namespace stream_cqsa::testing {

/// Elements of Q, K or V, all chunks one after the other; each is exact in the case's type.
struct CaseTensor {
  std::int64_t heads = 0;
  std::int64_t dim = 0;
  std::vector<float> elements;  ///< [position][head][dim]

  float* vector(std::int64_t position, std::int64_t head) {
    return elements.data() + (position * heads + head) * dim;
  }
  const float* vector(std::int64_t position, std::int64_t head) const {
    return elements.data() + (position * heads + head) * dim;
  }
};

/// A key chunk in the work list of a query chunk.
struct KeyUse {
  std::int64_t chunk;
  bool partial;
};

/// Rows are counted over all query chunks: row = position * heads + head.
struct AttentionCase {
  DType type = DType::f32;
  std::int64_t heads = 1;
  std::int64_t kv_heads = 1;
  std::int64_t dim = 64;
  float scale_log2 = 0.125f;
  std::int64_t causal_shift = 0;
  std::vector<Range> queries;             ///< chunks, as tokens of the sequence
  std::vector<Range> keys;                ///< likewise
  std::vector<std::vector<KeyUse>> uses;  ///< of each query chunk
  CaseTensor q, k, v;

  std::int64_t rows() const;
  /// The position of a chunk's first token.
  static std::int64_t first_position(const std::vector<Range>& chunks, std::int64_t chunk);
  /// Keys of a use that a query token sees.
  std::int64_t visible_keys(std::int64_t token, const KeyUse& use) const;
};

/// Rounds to the type and back.
float rounded(DType type, float value);

/// Appends every live chunk pair to the work lists, partial where the mask cuts through it. Without
/// the mask all pairs are live and none is partial. Each pair is kept with probability `kept`.
void use_live_pairs(AttentionCase& attention, bool causal, double kept, std::mt19937_64& random);

/// Normally distributed Q, K and V.
void fill_random(AttentionCase& attention, float deviation, std::mt19937_64& random);

/// Softmax states of all rows.
struct CaseStates {
  std::vector<float> acc;  ///< [row][dim]
  std::vector<float> m;    ///< [row]
  std::vector<float> l;    ///< [row]
};

/// What the states of the rows stand for, in fp64, and what their error is measured by.
struct CaseReference {
  std::vector<double> output;      ///< [row][dim], acc / l
  std::vector<double> spread;      ///< [row][dim], sum p |v| / l
  std::vector<double> lse;         ///< [row], m + log2(l)
  std::vector<double> score_size;  ///< [row], largest finite |scale| sum |q k|, in base 2
  std::vector<double> value_size;  ///< [row], largest finite |v|
  std::vector<std::int64_t> keys;  ///< [row], that it sees

  CaseReference(std::int64_t rows, std::int64_t dim);
};

/// By the definition, two passes over the keys of each row.
CaseReference brute_force(const AttentionCase& attention);

/// The largest error of the states over what rounding allows: of acc / l and of m + log2(l).
/// Infinity when a value is finite on one side only, or a row without a key is not empty.
double worst_ratio(const AttentionCase& attention, const CaseStates& states,
                   const CaseReference& reference);

/// True when the row has the same bytes in both.
bool same_row(const CaseStates& a, const CaseStates& b, std::int64_t row, std::int64_t dim);

}  // namespace stream_cqsa::testing
