// The fp64 reference: attention by its definition, row by row.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
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
  std::vector<double> output;  ///< [dim]; NaN where the definition gives NaN
  double lse = 0;              ///< natural logarithm; -infinity where the row sees no key
  double max_abs_value = 0;    ///< largest finite |v| among the keys seen
  double max_score_magnitude =
      0;  ///< max over keys of scale * log2(e) * sum_d |q_d k_d|, finite ones
};

/// Gets how many keys of rows have been seen since it was called before, from any thread.
using KeysSeen = std::function<void(std::int64_t keys)>;

/// Computes `rows` in one pass over K and V, reading at most `buffer_bytes` at a time. `seen` is
/// called as it goes: in all with the keys that the mask keeps, summed over the rows.
/// Arithmetic is fp64 throughout on the inputs as TensorSource gives them: float64 files rounded to
/// fp32. A key that the mask hides never touches a row; a NaN score makes the whole row NaN.
/// On `threads` threads, fewer of very many rows; 0: one for each core. Their number changes the
/// rounding.
std::vector<ReferenceRow> reference_rows(const Problem& problem, TensorSource& query,
                                         TensorSource& key, TensorSource& value,
                                         std::span<const RowIndex> rows,
                                         std::int64_t buffer_bytes = 64 << 20,
                                         const KeysSeen& seen = nullptr, int threads = 1);

/// A row restricted to some of the keys, as a subproblem computes it. Any two of the ranges, of one
/// row or of several, are equal or have no key in common; a row has each once.
struct RowKeys {
  RowIndex row;
  std::vector<Range> keys;
};

/// The same of rows that see no other keys than theirs, and of these those that the mask keeps:
/// each key range is read once for all rows that have it.
std::vector<ReferenceRow> reference_rows(const Problem& problem, TensorSource& query,
                                         TensorSource& key, TensorSource& value,
                                         std::span<const RowKeys> rows,
                                         std::int64_t buffer_bytes = 64 << 20,
                                         const KeysSeen& seen = nullptr, int threads = 1);

/// The largest |output - reference| that fp32 arithmetic on inputs of problem.dtype may leave in an
/// element of a row rounded to problem.output_dtype. With u = 2^-24, u_in and u_out the unit
/// roundoffs of the two types, V = row.max_abs_value, S = row.max_score_magnitude:
///
///     u_out max |o| + V min(2, 8 u (S + log2(keys) + 4) + (u_in if 16-bit)) + smallest step of f16
///
/// S covers the rounding of the scores, which moves each weight by that share; log2(keys) the
/// growth of sums; u_in the weights' rounding to the input's type before the product with V, which
/// tensor cores demand. No weighted mean is off by more than 2 V. Infinite where fp32 itself may
/// overflow.
double allowed_error(const Problem& problem, const ReferenceRow& row);

/// The largest |lse - reference| that fp32 may leave: 8 u (S + log2(keys) + 4) + 2 u |lse|, in the
/// terms of allowed_error(), and like it infinite where fp32 itself may overflow.
double allowed_lse_error(const Problem& problem, const ReferenceRow& row);

/// How an output row, or its lse, compares with the reference.
struct RowCheck {
  double max_error = 0;  ///< largest |output - reference| where both are finite
  double allowed = 0;    ///< allowed_error(), allowed_lse_error()
  bool ok = false;       ///< nothing wrong was found
  /// Whether there is a bound to hold the row to. Without one, `ok` says only that nothing is NaN
  /// where the reference is finite, nor finite where it is not.
  bool comparable() const { return allowed < std::numeric_limits<double>::infinity(); }
};

/// Compares `output` ([dim]) with the reference: within allowed_error() where the reference is
/// finite, NaN or infinite exactly where it is not (which of the two is not distinguished). A value
/// that problem.output_dtype cannot hold may end as infinity; NaN is never right for a finite one.
RowCheck check_row(const Problem& problem, const ReferenceRow& row, std::span<const double> output);

/// Compares a row's lse with the reference in the same way: within allowed_lse_error(); -infinity
/// exactly where the reference is; NaN or infinite where it is NaN.
RowCheck check_lse(const Problem& problem, const ReferenceRow& row, double lse);

}  // namespace stream_cqsa
