// finalise() of softmax states: O = acc / l, rounded to the output's type, and the lse.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/finalise.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>

#include "stream_cqsa/softmax_state.hpp"

HWY_BEFORE_NAMESPACE();
namespace stream_cqsa {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Each output type says how a vector of quotients becomes bits (in lanes of the quotient's width),
// and which of those bits are the exponent's. Compute is the type that the division is done in.
// NaN becomes the positive quiet one: which one arithmetic gives differs from device to device.
struct ToF32 {
  using Compute = float;
  using Stored = std::uint32_t;
  static constexpr std::uint32_t exponent_bits = 0x7f800000;
  template <class DU, class VF>
  static HWY_INLINE hn::Vec<DU> bits(DU u, VF value) {
    return hn::IfThenElse(hn::RebindMask(u, hn::IsNaN(value)), hn::Set(u, 0x7fc00000u),
                          hn::BitCast(u, value));
  }
};

struct ToF64 {
  using Compute = double;
  using Stored = std::uint64_t;
  static constexpr std::uint64_t exponent_bits = 0x7ff0000000000000;
  template <class DU, class VF>
  static HWY_INLINE hn::Vec<DU> bits(DU u, VF value) {
    return hn::IfThenElse(hn::RebindMask(u, hn::IsNaN(value)),
                          hn::Set(u, std::uint64_t{0x7ff8000000000000}), hn::BitCast(u, value));
  }
};

struct ToBf16 {
  using Compute = float;
  using Stored = std::uint16_t;
  static constexpr std::uint32_t exponent_bits = 0x7f80;
  template <class DU, class VF>
  static HWY_INLINE hn::Vec<DU> bits(DU u, VF value) {
    const auto from = hn::BitCast(u, value);
    const auto top = hn::ShiftRight<16>(from);
    const auto odd = hn::And(top, hn::Set(u, 1));
    const auto rounded = hn::Add(hn::Add(from, hn::Set(u, 0x7fff)), odd);
    const auto is_nan = hn::RebindMask(u, hn::IsNaN(value));
    return hn::IfThenElse(is_nan, hn::Set(u, 0x7fc0), hn::ShiftRight<16>(rounded));
  }
};

struct ToF16 {
  using Compute = float;
  using Stored = std::uint16_t;
  static constexpr std::uint32_t exponent_bits = 0x7c00;
  // Highway's own conversion truncates on targets without F16C.
  template <class DU, class VF>
  static HWY_INLINE hn::Vec<DU> bits(DU u, VF value) {
    const hn::RebindToFloat<DU> f;
    const hn::RebindToSigned<DU> i;
    const auto sign = hn::And(hn::BitCast(u, value), hn::Set(u, 0x80000000u));
    const auto magnitude = hn::Xor(hn::BitCast(u, value), sign);
    // Normal: the exponent's bias changes by 112; adding 0xfff plus the last kept bit rounds to
    // even.
    const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(u, 1));
    const auto biased = hn::Add(magnitude, hn::Set(u, 0xfffu - (112u << 23)));
    const auto normal = hn::ShiftRight<13>(hn::Add(biased, odd));
    // Subnormal: adding 1/2 moves the bits that are kept to the end, rounded by the addition.
    const auto half = hn::Set(u, 126u << 23);
    const auto moved = hn::Add(hn::BitCast(f, magnitude), hn::BitCast(f, half));
    const auto subnormal = hn::Sub(hn::BitCast(u, moved), half);
    const auto signed_magnitude = hn::BitCast(i, magnitude);
    const auto below_normal = hn::RebindMask(u, hn::Lt(signed_magnitude, hn::Set(i, 113 << 23)));
    const auto in_range = hn::RebindMask(u, hn::Lt(signed_magnitude, hn::Set(i, 143 << 23)));
    const auto is_nan = hn::RebindMask(u, hn::IsNaN(value));
    const auto finite = hn::IfThenElse(below_normal, subnormal, normal);
    const auto number = hn::IfThenElse(in_range, finite, hn::Set(u, 0x7c00));
    return hn::IfThenElse(is_nan, hn::Set(u, 0x7e00), hn::Or(number, hn::ShiftRight<16>(sign)));
  }
};

template <class D>
HWY_INLINE hn::Vec<D> load_as(D d, const float* from) {
  if constexpr (sizeof(hn::TFromD<D>) == sizeof(double)) {
    const hn::Rebind<float, D> narrow;
    return hn::PromoteTo(d, hn::LoadU(narrow, from));
  } else {
    return hn::LoadU(d, from);
  }
}

template <class Stored, class DU>
HWY_INLINE void store_as(DU u, hn::Vec<DU> bits, Stored* to) {
  if constexpr (sizeof(Stored) == sizeof(hn::TFromD<DU>)) {
    hn::StoreU(bits, u, to);
  } else {
    const hn::Rebind<Stored, DU> narrow;
    hn::StoreU(hn::TruncateTo(narrow, bits), narrow, to);
  }
}

// acc / l into `to` from element `i` on; sets `finite` to false when a value is not.
template <class To, class D>
HWY_INLINE std::int64_t divide_elements(D d, const float* acc, float l, std::int64_t i,
                                        std::int64_t dim, typename To::Stored* to, bool& finite) {
  const hn::RebindToUnsigned<D> u;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto divisor = hn::Set(d, static_cast<typename To::Compute>(l));
  const auto exponent_bits = hn::Set(u, To::exponent_bits);
  auto special = hn::Zero(u);
  for (; i + lanes <= dim; i += lanes) {
    const auto bits = To::bits(u, hn::Div(load_as(d, acc + i), divisor));
    const auto is_special = hn::Eq(hn::And(bits, exponent_bits), exponent_bits);
    special = hn::Or(special, hn::VecFromMask(u, is_special));
    store_as(u, bits, to + i);
  }
  finite = finite && hn::AllTrue(u, hn::Eq(special, hn::Zero(u)));
  return i;
}

template <class To>
NonFinite count_non_finite(const typename To::Stored* row, std::int64_t dim) {
  constexpr auto exponent = static_cast<typename To::Stored>(To::exponent_bits);
  constexpr auto mantissa = static_cast<typename To::Stored>((exponent & (~exponent + 1)) - 1);
  NonFinite count;
  for (std::int64_t i = 0; i < dim; ++i) {
    if ((row[i] & exponent) != exponent) continue;
    ++((row[i] & mantissa) != 0 ? count.nan : count.infinite);
  }
  return count;
}

template <class To>
NonFinite divide_rows(const SoftmaxStates& states, std::int64_t first_row, std::byte* output) {
  const hn::ScalableTag<typename To::Compute> vector;
  const hn::CappedTag<typename To::Compute, 1> scalar;
  auto* out = reinterpret_cast<typename To::Stored*>(output);
  NonFinite count;
  for (std::int64_t row = first_row; row < states.rows; ++row) {
    const float* acc = states.acc + row * states.dim;
    typename To::Stored* to = out + row * states.dim;
    const float l = states.l[row];
    bool finite = true;
    const std::int64_t left = divide_elements<To>(vector, acc, l, 0, states.dim, to, finite);
    divide_elements<To>(scalar, acc, l, left, states.dim, to, finite);
    if (!finite) count += count_non_finite<To>(to, states.dim);
  }
  return count;
}

NonFinite finalise_rows(const SoftmaxStates& states, std::int64_t first_row, DType type,
                        std::byte* output) {
  switch (type) {
    case DType::f16:
      return divide_rows<ToF16>(states, first_row, output);
    case DType::bf16:
      return divide_rows<ToBf16>(states, first_row, output);
    case DType::f32:
      return divide_rows<ToF32>(states, first_row, output);
    case DType::f64:
      return divide_rows<ToF64>(states, first_row, output);
  }
  return {};
}

}  // namespace HWY_NAMESPACE
}  // namespace stream_cqsa
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace stream_cqsa {

HWY_EXPORT(finalise_rows);

void log_sum_exp(const float* m, const float* l, std::int64_t rows, std::int64_t keyless_rows,
                 float* lse) {
  std::fill_n(lse, keyless_rows, -std::numeric_limits<float>::infinity());
  for (std::int64_t row = keyless_rows; row < rows; ++row) {
    // In double: m may be large, and log2(l) must not lose the digits that m pushes out.
    const double log2_sum = static_cast<double>(m[row]) + std::log2(double{l[row]});
    const auto value = static_cast<float>(std::numbers::ln2 * log2_sum);
    lse[row] = std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value;
  }
}

NonFinite finalise(const SoftmaxStates& states, std::int64_t heads, std::int64_t keyless_tokens,
                   DType type, std::byte* output, float* lse) {
  const std::int64_t first_row = std::min(keyless_tokens * heads, states.rows);
  std::memset(output, 0, static_cast<std::size_t>(first_row * states.dim * size_of(type)));
  const NonFinite count = HWY_DYNAMIC_DISPATCH(finalise_rows)(states, first_row, type, output);
  if (lse != nullptr) log_sum_exp(states.m, states.l, states.rows, first_row, lse);
  return count;
}

}  // namespace stream_cqsa
#endif
