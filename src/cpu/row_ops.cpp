#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/row_ops.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

#include <cmath>
#include <limits>

#include "cpu/row_ops.hpp"
#include "stream_cqsa/softmax_state.hpp"

HWY_BEFORE_NAMESPACE();
namespace stream_cqsa::row_ops {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using Vector = hn::CappedTag<float, row_padding>;
using Scalar = hn::CappedTag<float, 1>;

constexpr float infinity = std::numeric_limits<float>::infinity();

// Storage types: a vector of fp32 from memory.
struct FromF32 {
  using Stored = float;
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const float* from) {
    return hn::LoadU(d, from);
  }
};

struct FromBf16 {
  using Stored = std::uint16_t;
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const std::uint16_t* from) {
    const hn::RebindToUnsigned<D> u;
    const hn::Rebind<std::uint16_t, D> narrow;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(u, hn::LoadU(narrow, from))));
  }
};

struct FromF16 {
  using Stored = std::uint16_t;
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const std::uint16_t* from) {
    const hn::RebindToUnsigned<D> u;
    const hn::Rebind<std::uint16_t, D> narrow;
    const auto bits = hn::PromoteTo(u, hn::LoadU(narrow, from));
    const auto magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(u, 0x7fff)));
    const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(u, 0x8000)));
    // 2^112 is the difference of the exponent biases; the product is exact, subnormals included.
    const auto scaled = hn::Mul(hn::BitCast(d, magnitude), hn::Set(d, 0x1p112f));
    const auto is_finite = hn::Lt(scaled, hn::Set(d, 65536.0f));
    const auto all_ones = hn::BitCast(d, hn::Or(magnitude, hn::Set(u, 0x7f800000)));
    return hn::Or(hn::IfThenElse(is_finite, scaled, all_ones), hn::BitCast(d, sign));
  }
};

template <class From, class D>
HWY_INLINE std::int64_t load_elements(D d, const typename From::Stored* from, std::int64_t i,
                                      std::int64_t dim, float factor, float* HWY_RESTRICT to) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto factors = hn::Set(d, factor);
  for (; i + lanes <= dim; i += lanes) {
    hn::StoreU(hn::Mul(From::load(d, from + i), factors), d, to + i);
  }
  return i;
}

template <class From>
void load_rows_as(const std::byte* from, std::int64_t stride, std::int64_t rows, std::int64_t dim,
                  float factor, float* to) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto* source = reinterpret_cast<const typename From::Stored*>(from + row * stride);
    float* target = to + row * dim;
    const std::int64_t left = load_elements<From>(Vector(), source, 0, dim, factor, target);
    load_elements<From>(Scalar(), source, left, dim, factor, target);
  }
}

void load_rows(DType type, const std::byte* from, std::int64_t stride, std::int64_t rows,
               std::int64_t dim, float factor, float* to) {
  switch (type) {
    case DType::f16:
      return load_rows_as<FromF16>(from, stride, rows, dim, factor, to);
    case DType::bf16:
      return load_rows_as<FromBf16>(from, stride, rows, dim, factor, to);
    case DType::f32:
    case DType::f64:  // stored as fp32
      return load_rows_as<FromF32>(from, stride, rows, dim, factor, to);
  }
}

// exp2 for x <= 0, 2 ulp: 0 below -126.5, NaN for NaN.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V weight(D d, V x) {
  const hn::RebindToUnsigned<D> u;
  // -127 ends as a power with exponent field 0, which is 0. In this order of operands x86 keeps
  // NaN.
  x = hn::Max(hn::Set(d, -127.0f), x);
  const V round_to_integer = hn::Set(d, 0x1.8p23f);
  const V shifted = hn::Add(x, round_to_integer);
  const V f = hn::Sub(x, hn::Sub(shifted, round_to_integer));
  // Estrin's scheme: the loop over a row is bound by the length of this chain.
  const V f2 = hn::Mul(f, f);
  const V low = hn::MulAdd(hn::Set(d, Exp2Polynomial::c1), f, hn::Set(d, 1.0f));
  const V middle = hn::MulAdd(hn::Set(d, Exp2Polynomial::c3), f, hn::Set(d, Exp2Polynomial::c2));
  const V top = hn::MulAdd(hn::Set(d, Exp2Polynomial::c5), f, hn::Set(d, Exp2Polynomial::c4));
  const V high = hn::MulAdd(hn::Set(d, Exp2Polynomial::c6), f2, top);
  const V p = hn::MulAdd(hn::MulAdd(high, f2, middle), f2, low);
  // The integer stands in the low bits of `shifted`. A product, not a sum of bits, keeps NaN.
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(u, shifted));
  const V power = hn::BitCast(d, hn::Add(exponent, hn::BitCast(u, hn::Set(d, 1.0f))));
  return hn::Mul(p, power);
}

HWY_INLINE float row_max(const float* row, std::int64_t padded_keys) {
  const Vector d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  auto even = hn::Set(d, -infinity);
  auto odd = even;
  std::int64_t i = 0;
  for (; i + 2 * lanes <= padded_keys; i += 2 * lanes) {
    even = hn::Max(even, hn::LoadU(d, row + i));
    odd = hn::Max(odd, hn::LoadU(d, row + i + lanes));
  }
  for (; i < padded_keys; i += lanes) even = hn::Max(even, hn::LoadU(d, row + i));
  return hn::GetLane(hn::MaxOfLanes(d, hn::Max(even, odd)));
}

HWY_INLINE float row_weights(float* row, std::int64_t padded_keys, float shift) {
  const Vector d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto shifts = hn::Set(d, shift);
  auto sum = hn::Zero(d);
  for (std::int64_t i = 0; i < padded_keys; i += lanes) {
    const auto weights = weight(d, hn::Sub(hn::LoadU(d, row + i), shifts));
    hn::StoreU(weights, d, row + i);
    sum = hn::Add(sum, weights);
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

void softmax_rows(float* scores, std::int64_t stride, std::int64_t rows, std::int64_t keys,
                  float* m, float* l, float* rescale) {
  const std::int64_t padded_keys = (keys + row_padding - 1) / row_padding * row_padding;
  for (std::int64_t row = 0; row < rows; ++row) {
    float* score = scores + row * stride;
    for (std::int64_t key = keys; key < padded_keys; ++key) score[key] = -infinity;
    const float block_max = row_max(score, padded_keys);
    const float max = block_max > m[row] ? block_max : m[row];
    // A row that has met scores of -infinity alone: -infinity minus -infinity would be NaN.
    const float shift = max == -infinity ? 0.0f : max;
    const Scalar one;
    rescale[row] = hn::GetLane(weight(one, hn::Set(one, m[row] - shift)));
    l[row] = rescale[row] * l[row] + row_weights(score, padded_keys, shift);
    m[row] = max;
  }
}

template <class D>
HWY_INLINE std::int64_t scale_elements(D d, float* row, std::int64_t i, std::int64_t dim,
                                       float factor) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto factors = hn::Set(d, factor);
  for (; i + lanes <= dim; i += lanes)
    hn::StoreU(hn::Mul(hn::LoadU(d, row + i), factors), d, row + i);
  return i;
}

void scale_rows(float* acc, std::int64_t rows, std::int64_t dim, const float* rescale) {
  for (std::int64_t row = 0; row < rows; ++row) {
    if (rescale[row] == 1.0f) continue;
    const std::int64_t left = scale_elements(Vector(), acc + row * dim, 0, dim, rescale[row]);
    scale_elements(Scalar(), acc + row * dim, left, dim, rescale[row]);
  }
}

template <class D>
HWY_INLINE bool finite_elements(D d, const float* row, std::int64_t& i, std::int64_t dim) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  auto sum = hn::Zero(d);
  // x - x is 0 for finite x, else NaN.
  for (; i + lanes <= dim; i += lanes) {
    const auto x = hn::LoadU(d, row + i);
    sum = hn::Add(sum, hn::Sub(x, x));
  }
  return hn::AllTrue(d, hn::Eq(sum, hn::Zero(d)));
}

bool all_rows_finite(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t dim) {
  for (std::int64_t row = 0; row < rows; ++row) {
    std::int64_t i = 0;
    const bool vectors = finite_elements(Vector(), from + row * stride, i, dim);
    if (!vectors || !finite_elements(Scalar(), from + row * stride, i, dim)) return false;
  }
  return true;
}

std::string_view own_target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace stream_cqsa::row_ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace stream_cqsa::row_ops {

HWY_EXPORT(load_rows);
HWY_EXPORT(softmax_rows);
HWY_EXPORT(scale_rows);
HWY_EXPORT(all_rows_finite);
HWY_EXPORT(own_target);

void load(DType type, const std::byte* from, std::int64_t stride, std::int64_t rows,
          std::int64_t dim, float factor, float* to) {
  HWY_DYNAMIC_DISPATCH(load_rows)(type, from, stride, rows, dim, factor, to);
}

void softmax(float* scores, std::int64_t stride, std::int64_t rows, std::int64_t keys, float* m,
             float* l, float* rescale) {
  HWY_DYNAMIC_DISPATCH(softmax_rows)(scores, stride, rows, keys, m, l, rescale);
}

void scale(float* acc, std::int64_t rows, std::int64_t dim, const float* rescale) {
  HWY_DYNAMIC_DISPATCH(scale_rows)(acc, rows, dim, rescale);
}

bool all_finite(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t dim) {
  return HWY_DYNAMIC_DISPATCH(all_rows_finite)(from, stride, rows, dim);
}

std::string_view target_name() { return HWY_DYNAMIC_DISPATCH(own_target)(); }

}  // namespace stream_cqsa::row_ops
#endif
