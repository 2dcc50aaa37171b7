// Vectorised row operations of the CPU kernel, with run-time dispatch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "stream_cqsa/dtype.hpp"

namespace stream_cqsa::row_ops {

/// Rows of score tiles are padded to a multiple of this many elements.
inline constexpr std::int64_t row_padding = 16;

/// `rows` rows of `dim` elements in a storage type, `stride` bytes apart, as fp32 times `scale`.
/// to: [rows][dim]
void load(DType type, const std::byte* from, std::int64_t stride, std::int64_t rows,
          std::int64_t dim, float scale, float* to);

/// One key block of the online softmax, for `rows` rows of `keys` base-2 scores, `stride` elements
/// apart. Raises m, replaces the scores by weights exp2(s - m), updates l, and puts the factor that
/// takes what was accumulated before to the new m into `rescale`. Scores of -infinity weigh 0; NaN
/// reaches l. Writes into the padding after the scores.
/// m, l, rescale: [rows]
void softmax(float* scores, std::int64_t stride, std::int64_t rows, std::int64_t keys, float* m,
             float* l, float* rescale);

/// acc *= rescale, row by row. acc: [rows][dim], rescale: [rows]
void scale(float* acc, std::int64_t rows, std::int64_t dim, const float* rescale);

/// True when all elements of `rows` rows, `stride` elements apart, are finite.
bool all_finite(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t dim);

/// The vector instructions that these use here, whose width decides the order of sums.
std::string_view target_name();

}  // namespace stream_cqsa::row_ops
