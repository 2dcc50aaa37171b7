// Softmax states, their exact merge, and the end of a row.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "stream_cqsa/dtype.hpp"
#include "stream_cqsa/range.hpp"

#if defined(__CUDACC__)
#define STREAM_CQSA_HOST_DEVICE __host__ __device__
#else
#define STREAM_CQSA_HOST_DEVICE
#endif

namespace stream_cqsa {

/// Softmax states of `rows` query rows. Scores are in base 2, s = scale * log2(e) * q.k:
///   m = max s     l = sum exp2(s - m)     acc = sum exp2(s - m) * v
/// A kernel may leave m at the maximum of some of the keys (the Hopper kernel up to 9 below that of
/// all): l and acc are then sums over all keys relative to it. Merge and end of a row are as exact
/// for any m; l and acc need the room in fp32.
/// A row that has seen no key has m = -infinity, l = 0, acc = 0.
/// Wherever rows are both tokens and heads, row = token * heads + head.
struct SoftmaxStates {
  float* acc = nullptr;  ///< [rows][dim]
  float* m = nullptr;    ///< [rows]
  float* l = nullptr;    ///< [rows]
  std::int64_t rows = 0;
  std::int64_t dim = 0;
};

/// Bytes of `rows` states of dimension `dim`, stored acc, then m, then l.
constexpr std::int64_t softmax_state_bytes(std::int64_t rows, std::int64_t dim) {
  return rows * (dim + 2) * static_cast<std::int64_t>(sizeof(float));
}

/// Of a file, what softmax states in it begin at multiples of: bytes.
inline constexpr std::int64_t state_slot_alignment = 4096;

/// Bytes that states of so many bytes take in a file.
constexpr std::int64_t state_slot_bytes(std::int64_t bytes) {
  return round_up(bytes, state_slot_alignment);
}

/// The states stored in `memory` (acc, then m, then l).
inline SoftmaxStates softmax_states_at(std::byte* memory, std::int64_t rows, std::int64_t dim) {
  auto* acc = reinterpret_cast<float*>(memory);
  return {acc, acc + rows * dim, acc + rows * (dim + 1), rows, dim};
}

/// exp2(f) = 1 + f (c1 + f (c2 + ... + f c6)) for f in [-1/2, 1/2], relative error below 2^-26.6
/// before rounding. Remez exchange on the relative error; each coefficient in turn, from c1 on, is
/// rounded to fp32 and the remaining ones are fitted again.
struct Exp2Polynomial {
  static constexpr float c1 = 0x1.62e432p-1f;
  static constexpr float c2 = 0x1.ebfbe6p-3f;
  static constexpr float c3 = 0x1.c6ada8p-5f;
  static constexpr float c4 = 0x1.3b2176p-7f;
  static constexpr float c5 = 0x1.5fc788p-10f;
  static constexpr float c6 = 0x1.4c632cp-13f;
};

/// exp2(x) for merge weights. At most 0.83 ulp off for -126 <= x <= 0 (0.8208 measured over all of
/// these floats), exactly 1 at 0; 0 below -126; NaN for NaN and for x > 0, which no weight has.
/// Only explicit fma and exact operations, so that host and device give the same bits.
STREAM_CQSA_HOST_DEVICE inline float merge_exp2(float x) {
  if (!(x <= 0.0f)) return __builtin_nanf("");
  if (x < -126.0f) return 0.0f;
  // exp2(x) = 2^n * exp2(f), n = round(x), f = x - n. Adding 1.5 * 2^23 rounds x to an integer,
  // which then stands in the low bits of the sum.
  constexpr float round_to_integer = 0x1.8p23f;
  const float shifted = x + round_to_integer;
  const float f = x - (shifted - round_to_integer);
  float p = Exp2Polynomial::c6;
  p = std::fmaf(p, f, Exp2Polynomial::c5);
  p = std::fmaf(p, f, Exp2Polynomial::c4);
  p = std::fmaf(p, f, Exp2Polynomial::c3);
  p = std::fmaf(p, f, Exp2Polynomial::c2);
  p = std::fmaf(p, f, Exp2Polynomial::c1);
  p = std::fmaf(p, f, 1.0f);
#if defined(__CUDA_ARCH__)
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
#else
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(p) +
                              (std::bit_cast<std::uint32_t>(shifted) << 23));
#endif
}

/// The two weights of a merge: M = max(m1, m2), w = exp2(m - M), and 0 where m is -infinity.
struct MergeWeights {
  float max;
  float first;
  float second;
};

STREAM_CQSA_HOST_DEVICE inline MergeWeights merge_weights(float m1, float m2) {
  const float max = m1 > m2 ? m1 : m2;
  // Two empty rows: -infinity minus -infinity would be NaN. NaN in either m reaches its weight.
  const float shift = max == -HUGE_VALF ? 0.0f : max;
  return {max, merge_exp2(m1 - shift), merge_exp2(m2 - shift)};
}

/// into = merge(into, from), row by row:
///   l = fma(w1, l1, w2 * l2), acc = fma(w1, acc1, w2 * acc2).
/// Vectorised; the bits do not depend on the instruction set. rows and dim must agree.
void merge(const SoftmaxStates& into, const SoftmaxStates& from);

/// How many NaN and infinite values a pass over data met.
struct NonFinite {
  std::int64_t nan = 0;
  std::int64_t infinite = 0;
  NonFinite& operator+=(const NonFinite& other) {
    nan += other.nan;
    infinite += other.infinite;
    return *this;
  }
  friend bool operator==(const NonFinite&, const NonFinite&) = default;
};

/// Ends rows: O = acc / l and lse = ln(2) * (m + log2(l)), natural logarithm. A row whose scores
/// were all -infinity has l = 0 and ends as NaN, as by definition.
///
/// states: tokens * heads rows, row = token * heads + head.
/// The first `keyless_tokens` tokens see no key at all: O = 0, lse = -infinity.
/// output: [token][head][dim] in `type`, rounded to nearest even.
/// lse: [rows] fp32, or null.
/// states.acc, m and l may be null where every token is keyless.
/// Returns the NaN and infinite values written to output.
NonFinite finalise(const SoftmaxStates& states, std::int64_t heads, std::int64_t keyless_tokens,
                   DType type, std::byte* output, float* lse);

/// The lse alone, as finalise() gives it, of `rows` rows of which the first `keyless_rows` see no
/// key. `lse` may be `m`.
void log_sum_exp(const float* m, const float* l, std::int64_t rows, std::int64_t keyless_rows,
                 float* lse);

}  // namespace stream_cqsa
