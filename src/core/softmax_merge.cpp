// merge() of softmax states, vectorised with run-time dispatch.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/softmax_merge.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

#include <algorithm>

#include "core/softmax_merge-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace stream_cqsa {
namespace HWY_NAMESPACE {

// Rows whose weights are computed together; their weights stay in the first-level cache.
constexpr std::int64_t weight_batch = 256;

struct RowWeights {
  HWY_ALIGN float first[weight_batch];
  HWY_ALIGN float second[weight_batch];
};

// merge_weights() of the rows from `row` on, and their new m and l; returns the first row left.
template <class D>
std::int64_t merge_rows(D d, const SoftmaxStates& into, const SoftmaxStates& from,
                        std::int64_t begin, std::int64_t row, std::int64_t end,
                        RowWeights& weights) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto minus_infinity = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (; row + lanes <= end; row += lanes) {
    const auto m1 = hn::LoadU(d, into.m + row);
    const auto m2 = hn::LoadU(d, from.m + row);
    const auto max = hn::IfThenElse(hn::Gt(m1, m2), m1, m2);
    const auto shift = hn::IfThenZeroElse(hn::Eq(max, minus_infinity), max);
    const auto w1 = vector_merge_exp2(d, hn::Sub(m1, shift));
    const auto w2 = vector_merge_exp2(d, hn::Sub(m2, shift));
    const auto l2 = hn::Mul(w2, hn::LoadU(d, from.l + row));
    hn::StoreU(max, d, into.m + row);
    hn::StoreU(exact_fma(d, w1, hn::LoadU(d, into.l + row), l2), d, into.l + row);
    hn::StoreU(w1, d, weights.first + (row - begin));
    hn::StoreU(w2, d, weights.second + (row - begin));
  }
  return row;
}

// acc1 = fma(w1, acc1, w2 * acc2) from element `i` on; returns the first element left.
template <class D>
HWY_INLINE std::int64_t merge_elements(D d, float w1, float w2, float* HWY_RESTRICT acc1,
                                       const float* HWY_RESTRICT acc2, std::int64_t i,
                                       std::int64_t dim) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto first = hn::Set(d, w1);
  const auto second = hn::Set(d, w2);
  for (; i + lanes <= dim; i += lanes) {
    const auto scaled = hn::Mul(second, hn::LoadU(d, acc2 + i));
    hn::StoreU(exact_fma(d, first, hn::LoadU(d, acc1 + i), scaled), d, acc1 + i);
  }
  return i;
}

void merge_states(const SoftmaxStates& into, const SoftmaxStates& from) {
  const hn::ScalableTag<float> vector;
  const hn::CappedTag<float, 1> scalar;
  RowWeights weights;
  for (std::int64_t begin = 0; begin < into.rows; begin += weight_batch) {
    const std::int64_t end = std::min(begin + weight_batch, into.rows);
    const std::int64_t left = merge_rows(vector, into, from, begin, begin, end, weights);
    merge_rows(scalar, into, from, begin, left, end, weights);
    for (std::int64_t row = begin; row < end; ++row) {
      const float w1 = weights.first[row - begin];
      const float w2 = weights.second[row - begin];
      float* acc1 = into.acc + row * into.dim;
      const float* acc2 = from.acc + row * into.dim;
      const std::int64_t tail = merge_elements(vector, w1, w2, acc1, acc2, 0, into.dim);
      merge_elements(scalar, w1, w2, acc1, acc2, tail, into.dim);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace stream_cqsa
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace stream_cqsa {

HWY_EXPORT(merge_states);

void merge(const SoftmaxStates& into, const SoftmaxStates& from) {
  HWY_DYNAMIC_DISPATCH(merge_states)(into, from);
}

}  // namespace stream_cqsa
#endif
