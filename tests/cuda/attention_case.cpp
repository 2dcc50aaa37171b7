#include "attention_case.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace stream_cqsa::testing {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

bool both_finite_or_neither(double a, double b) { return std::isfinite(a) == std::isfinite(b); }

// One row by the definition.
class ReferenceRow {
 public:
  ReferenceRow(const AttentionCase& attention, std::int64_t chunk, std::int64_t token,
               std::int64_t row)
      : case_(attention), chunk_(chunk), token_(token), row_(row) {}

  void compute(CaseReference& to) {
    for_each_key([&](std::int64_t key) { add_score(key, to); });
    const auto at = static_cast<std::size_t>(row_);
    to.keys[at] = static_cast<std::int64_t>(scores_.size());
    double l = 0;
    double m = -infinity;
    for (const double score : scores_) m = score > m ? score : m;
    std::size_t next = 0;
    for_each_key([&](std::int64_t key) {
      const double score = scores_[next++];
      const double weight = score == -infinity ? 0.0 : std::exp2(score - m);
      l += weight;
      add_value(key, weight, to);
    });
    to.lse[at] = m + std::log2(l);
    if (scores_.empty()) return;
    for (std::int64_t i = 0; i < case_.dim; ++i) {
      to.output[at_dim(i)] /= l;
      to.spread[at_dim(i)] /= l;
    }
  }

 private:
  std::int64_t head() const { return row_ % case_.heads; }
  std::int64_t kv_head() const { return head() / (case_.heads / case_.kv_heads); }
  std::size_t at_dim(std::int64_t i) const {
    return static_cast<std::size_t>(row_ * case_.dim + i);
  }

  template <class Use>
  void for_each_key(Use use) const {
    for (const KeyUse& part : case_.uses[static_cast<std::size_t>(chunk_)]) {
      const std::int64_t first = AttentionCase::first_position(case_.keys, part.chunk);
      const std::int64_t visible = case_.visible_keys(token_, part);
      for (std::int64_t key = first; key < first + visible; ++key) use(key);
    }
  }

  void add_score(std::int64_t key, CaseReference& to) {
    const float* q = case_.q.vector(row_ / case_.heads, head());
    const float* k = case_.k.vector(key, kv_head());
    double score = 0;
    double size = 0;
    for (std::int64_t i = 0; i < case_.dim; ++i) {
      const double product = double{q[i]} * double{k[i]};
      score += product;
      size += std::abs(product);
    }
    scores_.push_back(score * double{case_.scale_log2});
    size *= std::abs(double{case_.scale_log2});
    double& largest = to.score_size[static_cast<std::size_t>(row_)];
    if (std::isfinite(size)) largest = std::max(largest, size);
  }

  void add_value(std::int64_t key, double weight, CaseReference& to) const {
    const float* v = case_.v.vector(key, kv_head());
    double& largest = to.value_size[static_cast<std::size_t>(row_)];
    for (std::int64_t i = 0; i < case_.dim; ++i) {
      const double size = std::abs(double{v[i]});
      to.output[at_dim(i)] += weight * double{v[i]};
      to.spread[at_dim(i)] += weight * size;
      if (std::isfinite(size)) largest = std::max(largest, size);
    }
  }

  const AttentionCase& case_;
  const std::int64_t chunk_, token_, row_;
  std::vector<double> scores_;
};

bool is_empty_row(const CaseStates& states, std::int64_t row, std::int64_t dim) {
  const auto at = static_cast<std::size_t>(row);
  const auto first = states.acc.begin() + row * dim;
  return states.m[at] == -std::numeric_limits<float>::infinity() && states.l[at] == 0 &&
         std::all_of(first, first + dim, [](float acc) { return acc == 0; });
}

// Relative error of a weight: the score's, an fp32 sum over the head dimension (its roundings add
// up as a random walk; 8 more for tensor cores, which truncate), and that of the sums over keys.
double weight_error(std::int64_t dim, const CaseReference& reference, std::size_t row) {
  constexpr double u = 0x1p-24;
  const double score = (8 + std::sqrt(static_cast<double>(dim))) * reference.score_size[row];
  return u * (score + 8 * std::sqrt(static_cast<double>(reference.keys[row])) + 32);
}

double output_tolerance(const AttentionCase& attention, const CaseReference& reference,
                        std::size_t row, double spread) {
  const DType type = attention.type;
  const auto keys = static_cast<double>(reference.keys[row]);
  // Weights are rounded to the storage type before they meet V.
  const double rounding = size_of(type) == 2 ? unit_roundoff(type) : 0;
  // Half of the smallest step of fp16: the error of small weights is not relative.
  const double step = type == DType::f16 ? 0x1p-25 : 0x1p-140;
  return reference.value_size[row] *
             (std::min(2.0, 2 * weight_error(attention.dim, reference, row)) + keys * step) +
         rounding * spread + 0x1p-140;
}

double row_ratio(const AttentionCase& attention, const CaseStates& states,
                 const CaseReference& reference, std::int64_t row) {
  const auto at = static_cast<std::size_t>(row);
  if (reference.keys[at] == 0) return is_empty_row(states, row, attention.dim) ? 0.0 : infinity;
  const double lse = double{states.m[at]} + std::log2(double{states.l[at]});
  if (!both_finite_or_neither(lse, reference.lse[at])) return infinity;
  double worst = 0;
  if (std::isfinite(lse)) {
    const double tolerance = 3 * weight_error(attention.dim, reference, at) +
                             0x1p-22 * (std::abs(reference.lse[at]) + 1);
    worst = std::abs(lse - reference.lse[at]) / tolerance;
  }
  for (std::int64_t i = 0; i < attention.dim; ++i) {
    const auto element = static_cast<std::size_t>(row * attention.dim + i);
    const double got = double{states.acc[element]} / double{states.l[at]};
    const double want = reference.output[element];
    if (!both_finite_or_neither(got, want)) return infinity;
    if (!std::isfinite(want)) continue;
    const double tolerance = output_tolerance(attention, reference, at, reference.spread[element]);
    const double ratio = std::abs(got - want) / tolerance;
    if (!(ratio <= worst)) worst = ratio;
  }
  return worst;
}

}  // namespace

std::int64_t AttentionCase::rows() const {
  return first_position(queries, static_cast<std::int64_t>(queries.size())) * heads;
}

std::int64_t AttentionCase::first_position(const std::vector<Range>& chunks, std::int64_t chunk) {
  std::int64_t position = 0;
  for (std::int64_t i = 0; i < chunk; ++i) position += chunks[static_cast<std::size_t>(i)].size();
  return position;
}

std::int64_t AttentionCase::visible_keys(std::int64_t token, const KeyUse& use) const {
  const Range tokens = keys[static_cast<std::size_t>(use.chunk)];
  if (!use.partial) return tokens.size();
  return std::clamp<std::int64_t>(token + causal_shift + 1 - tokens.begin, 0, tokens.size());
}

float rounded(DType type, float value) {
  if (type == DType::f16) return f16_to_f32(f32_to_f16(value));
  return type == DType::bf16 ? bf16_to_f32(f32_to_bf16(value)) : value;
}

void use_live_pairs(AttentionCase& attention, bool causal, double kept, std::mt19937_64& random) {
  std::bernoulli_distribution keep(kept);
  attention.uses.resize(attention.queries.size());
  for (std::size_t p = 0; p < attention.queries.size(); ++p) {
    const Range query = attention.queries[p];
    for (std::size_t q = 0; q < attention.keys.size(); ++q) {
      const Range key = attention.keys[q];
      const bool live = !causal || key.begin <= query.end - 1 + attention.causal_shift;
      const bool partial = causal && key.end - 1 > query.begin + attention.causal_shift;
      if (live && keep(random)) {
        attention.uses[p].push_back({static_cast<std::int64_t>(q), partial});
      }
    }
  }
}

void fill_random(AttentionCase& attention, float deviation, std::mt19937_64& random) {
  std::normal_distribution<float> normal(0, deviation);
  const auto fill = [&](CaseTensor& tensor, const std::vector<Range>& chunks, std::int64_t heads) {
    const auto count = static_cast<std::int64_t>(chunks.size());
    tensor.heads = heads;
    tensor.dim = attention.dim;
    tensor.elements.resize(static_cast<std::size_t>(AttentionCase::first_position(chunks, count) *
                                                    heads * attention.dim));
    for (float& element : tensor.elements) element = rounded(attention.type, normal(random));
  };
  fill(attention.q, attention.queries, attention.heads);
  fill(attention.k, attention.keys, attention.kv_heads);
  fill(attention.v, attention.keys, attention.kv_heads);
}

CaseReference::CaseReference(std::int64_t rows, std::int64_t dim)
    : output(static_cast<std::size_t>(rows * dim)),
      spread(output.size()),
      lse(static_cast<std::size_t>(rows), -infinity),
      score_size(lse.size()),
      value_size(lse.size()),
      keys(lse.size()) {}

CaseReference brute_force(const AttentionCase& attention) {
  CaseReference reference(attention.rows(), attention.dim);
  std::int64_t row = 0;
  for (std::size_t chunk = 0; chunk < attention.queries.size(); ++chunk) {
    const Range tokens = attention.queries[chunk];
    for (std::int64_t token = tokens.begin; token < tokens.end; ++token) {
      for (std::int64_t head = 0; head < attention.heads; ++head, ++row) {
        ReferenceRow(attention, static_cast<std::int64_t>(chunk), token, row).compute(reference);
      }
    }
  }
  return reference;
}

double worst_ratio(const AttentionCase& attention, const CaseStates& states,
                   const CaseReference& reference) {
  double worst = 0;
  for (std::int64_t row = 0; row < attention.rows(); ++row) {
    const double ratio = row_ratio(attention, states, reference, row);
    if (!(ratio <= worst)) worst = ratio;
    if (std::isnan(worst)) return infinity;
  }
  return worst;
}

bool same_row(const CaseStates& a, const CaseStates& b, std::int64_t row, std::int64_t dim) {
  const auto same = [row](const std::vector<float>& x, const std::vector<float>& y,
                          std::int64_t width) {
    return std::memcmp(x.data() + row * width, y.data() + row * width,
                       static_cast<std::size_t>(width) * sizeof(float)) == 0;
  };
  return same(a.acc, b.acc, dim) && same(a.m, b.m, 1) && same(a.l, b.l, 1);
}

}  // namespace stream_cqsa::testing
