// The fp64 reference: attention by its definition, row by row.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "stream_cqsa/problem.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// One output row.
struct RowIndex {
  std::int64_t batch = 0;
  std::int64_t token = 0;
  std::int64_t head = 0;  ///< query head
  friend bool operator==(const RowIndex&, const RowIndex&) = default;
};

/// The exact answer for one row, in fp64, and what its rounding error scales with.
struct ReferenceRow {
  std::vector<double> output;      ///< [dim]; NaN where the definition gives NaN
  double lse = 0;                  ///< natural logarithm; -infinity where the row sees no key
  double max_abs_value = 0;        ///< largest finite |v| among the keys seen
  double max_score_magnitude = 0;  ///< max over keys of scale * log2(e) * sum_d |q_d k_d|, finite ones
};

/// Computes `rows` in one pass over K and V, reading at most `buffer_bytes` at a time.
/// Arithmetic is fp64 throughout on the inputs as stored (float64 files are used unrounded only up
/// to fp32: TensorSource gives their storage type).
std::vector<ReferenceRow> reference_rows(const Problem& problem, TensorSource& query,
                                         TensorSource& key, TensorSource& value,
                                         std::span<const RowIndex> rows,
                                         std::int64_t buffer_bytes = 64 << 20);

/// The largest |output - reference| that fp32 arithmetic on inputs of problem.dtype may leave in a
/// row rounded to problem.output_dtype.
double allowed_error(const Problem& problem, const ReferenceRow& row);

}  // namespace stream_cqsa
