// Vector form of merge_exp2, for inclusion once per Highway target.
#if defined(STREAM_CQSA_CORE_SOFTMAX_MERGE_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef STREAM_CQSA_CORE_SOFTMAX_MERGE_INL_HPP
#undef STREAM_CQSA_CORE_SOFTMAX_MERGE_INL_HPP
#else
#define STREAM_CQSA_CORE_SOFTMAX_MERGE_INL_HPP
#endif

#include <hwy/highway.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "stream_cqsa/softmax_state.hpp"

HWY_BEFORE_NAMESPACE();
namespace stream_cqsa {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

/// a * b + c with one rounding on every target, so that the bits never depend on the target.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exact_fma(D d, V a, V b, V c) {
#if HWY_NATIVE_FMA
  (void)d;
  return hn::MulAdd(a, b, c);
#else
  HWY_ALIGN float lanes[3][hn::MaxLanes(d)];
  hn::Store(a, d, lanes[0]);
  hn::Store(b, d, lanes[1]);
  hn::Store(c, d, lanes[2]);
  for (std::size_t i = 0; i < hn::Lanes(d); ++i) {
    lanes[0][i] = std::fma(lanes[0][i], lanes[1][i], lanes[2][i]);
  }
  return hn::Load(d, lanes[0]);
#endif
}

/// merge_exp2 of every lane, the same bits.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V vector_merge_exp2(D d, V x) {
  const hn::RebindToUnsigned<D> bits;
  const V round_to_integer = hn::Set(d, 0x1.8p23f);
  const V shifted = hn::Add(x, round_to_integer);
  const V f = hn::Sub(x, hn::Sub(shifted, round_to_integer));
  V p = hn::Set(d, Exp2Polynomial::c6);
  p = exact_fma(d, p, f, hn::Set(d, Exp2Polynomial::c5));
  p = exact_fma(d, p, f, hn::Set(d, Exp2Polynomial::c4));
  p = exact_fma(d, p, f, hn::Set(d, Exp2Polynomial::c3));
  p = exact_fma(d, p, f, hn::Set(d, Exp2Polynomial::c2));
  p = exact_fma(d, p, f, hn::Set(d, Exp2Polynomial::c1));
  p = exact_fma(d, p, f, hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(bits, shifted));
  const V scaled = hn::BitCast(d, hn::Add(hn::BitCast(bits, p), exponent));
  const V flushed = hn::IfThenElseZero(hn::Ge(x, hn::Set(d, -126.0f)), scaled);
  const V nan = hn::Set(d, std::numeric_limits<float>::quiet_NaN());
  return hn::IfThenElse(hn::Le(x, hn::Zero(d)), flushed, nan);
}

}  // namespace HWY_NAMESPACE
}  // namespace stream_cqsa
HWY_AFTER_NAMESPACE();

#endif
