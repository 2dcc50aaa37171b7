// How far from the fp64 reference fp32 arithmetic may end.
#include <algorithm>
#include <cmath>
#include <limits>

#include "stream_cqsa/reference.hpp"

namespace stream_cqsa {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double u = 0x1p-24;  // the unit roundoff of fp32
// A score, or the largest value times the keys, beyond this may leave the range of fp32 on the way:
// weights may be relative to an earlier maximum, and are then below 2^5 on average instead of 1.
constexpr double overflow = 0x1p122;

// The relative error of a weight, and of a sum of them.
double score_error(const Problem& problem, const ReferenceRow& row) {
  const auto keys = static_cast<double>(problem.key_length);
  return 8 * u * (row.max_score_magnitude + std::log2(keys) + 4);
}

double largest_finite(DType type) {
  switch (type) {
    case DType::f16:
      return 65504;
    case DType::bf16:
      return 0x1.fep127;
    case DType::f32:
      return std::numeric_limits<float>::max();
    case DType::f64:
      return std::numeric_limits<double>::max();
  }
  return 0;
}

}  // namespace

double allowed_error(const Problem& problem, const ReferenceRow& row) {
  const auto keys = static_cast<double>(problem.key_length);
  if (!(row.max_score_magnitude <= overflow && row.max_abs_value * keys <= overflow)) {
    return infinity;
  }
  double largest = 0;
  for (const double value : row.output) {
    if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
  }
  const bool rounds_weights = size_of(storage_type(problem.dtype)) == 2;
  const double arithmetic =
      score_error(problem, row) + (rounds_weights ? unit_roundoff(problem.dtype) : 0);
  // Half of the smallest step of the type, below which the error is no longer relative; 2^-149 for
  // fp32 and bf16 sums that end as subnormals.
  const double smallest = problem.output_dtype == DType::f16 ? 0x1p-25 : 0x1p-133;
  return unit_roundoff(problem.output_dtype) * largest +
         row.max_abs_value * std::min(2.0, arithmetic) + smallest;
}

RowCheck check_row(const Problem& problem, const ReferenceRow& row,
                   std::span<const double> output) {
  RowCheck check;
  check.allowed = allowed_error(problem, row);
  check.ok = output.size() == row.output.size();
  const double limit = largest_finite(problem.output_dtype) - check.allowed;
  for (std::size_t i = 0; check.ok && i < output.size(); ++i) {
    const double want = row.output[i];
    const double got = output[i];
    if (!std::isfinite(want)) {
      check.ok = !std::isfinite(got);
    } else if (!std::isfinite(got)) {
      const bool overflowed = std::abs(want) >= limit && std::signbit(want) == std::signbit(got);
      check.ok = std::isinf(got) && (overflowed || !check.comparable());
    } else {
      check.max_error = std::max(check.max_error, std::abs(got - want));
    }
  }
  check.ok = check.ok && check.max_error <= check.allowed;
  return check;
}

double allowed_lse_error(const Problem& problem, const ReferenceRow& row) {
  if (!(row.max_score_magnitude <= overflow)) return infinity;
  return score_error(problem, row) + 2 * u * std::abs(row.lse);
}

RowCheck check_lse(const Problem& problem, const ReferenceRow& row, double lse) {
  RowCheck check;
  if (!std::isfinite(row.lse)) {
    check.ok = row.lse == -infinity ? lse == -infinity : !std::isfinite(lse);
    return check;
  }
  check.allowed = allowed_lse_error(problem, row);
  check.max_error = std::isfinite(lse) ? std::abs(lse - row.lse) : 0;
  check.ok = std::isfinite(lse) ? check.max_error <= check.allowed
                                : !std::isnan(lse) && !check.comparable();
  return check;
}

}  // namespace stream_cqsa
