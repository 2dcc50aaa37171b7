#include "stream_cqsa/reference.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>

namespace stream_cqsa {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

// A row on its way: the softmax state in fp64, scores in natural base.
struct Row {
  RowIndex index;
  std::int64_t kv_head = 0;
  std::int64_t visible_keys = 0;
  std::vector<double> query;
  double m = -infinity;
  double l = 0;
  std::vector<double> acc;
  double max_abs_value = 0;
  double max_score_magnitude = 0;
};

// A block of one tensor in memory, vector by vector.
class LoadedBlock {
 public:
  LoadedBlock(TensorSource& source, const Block& wanted) : desc_(source.desc()), block_(wanted) {
    block_.heads = desc_.readable_heads(wanted.heads);
    const std::int64_t bytes = block_.vectors() * vector_bytes();
    memory_.resize(static_cast<std::size_t>(bytes));
    source.read(block_, memory_);
    rows_ = packed_rows(memory_.data(), block_, desc_.layout, vector_bytes());
  }

  // The vector of an absolute token and head.
  void copy_vector(std::int64_t token, std::int64_t head, std::vector<double>& to) const {
    const std::byte* from = rows_.data + (token - block_.tokens.begin) * rows_.token_stride +
                            (head - block_.heads.begin) * rows_.head_stride;
    for (std::size_t i = 0; i < to.size(); ++i) to[i] = element(from, i);
  }

 private:
  DType type() const { return storage_type(desc_.dtype); }
  std::int64_t vector_bytes() const { return desc_.dim * size_of(type()); }

  double element(const std::byte* from, std::size_t i) const {
    if (type() == DType::f32) {
      float value = 0;
      std::memcpy(&value, from + i * sizeof value, sizeof value);
      return value;
    }
    std::uint16_t bits = 0;
    std::memcpy(&bits, from + i * sizeof bits, sizeof bits);
    return type() == DType::f16 ? f16_to_f32(bits) : bf16_to_f32(bits);
  }

  const TensorDesc& desc_;
  Block block_;
  std::vector<std::byte> memory_;
  StridedRows rows_;
};

Row start_row(const Problem& problem, TensorSource& query, const RowIndex& index) {
  Row row;
  row.index = index;
  row.kv_head = index.head / problem.query_heads_per_kv_head();
  row.visible_keys =
      std::clamp<std::int64_t>(problem.visible_keys(index.token), 0, problem.key_length);
  row.query.resize(static_cast<std::size_t>(problem.head_dim));
  row.acc.resize(row.query.size());
  const LoadedBlock block(
      query, {index.batch, {index.token, index.token + 1}, {index.head, index.head + 1}});
  block.copy_vector(index.token, index.head, row.query);
  return row;
}

void add_key(const Problem& problem, const std::vector<double>& key,
             const std::vector<double>& value, Row& row) {
  double score = 0;
  double magnitude = 0;
  for (std::size_t i = 0; i < key.size(); ++i) {
    const double product = row.query[i] * key[i];
    score += product;
    magnitude += std::abs(product);
  }
  score *= problem.scale;
  magnitude *= std::abs(problem.scale) * std::numbers::log2e;
  if (std::isfinite(magnitude)) {
    row.max_score_magnitude = std::max(row.max_score_magnitude, magnitude);
  }
  if (score > row.m) {
    const double rescale = std::exp(row.m - score);
    row.l *= rescale;
    for (double& acc : row.acc) acc *= rescale;
    row.m = score;
  }
  // While all scores are -infinity nothing has weight; at the end 0 / 0 gives the NaN of the
  // definition.
  const double weight = score == -infinity ? 0.0 : std::exp(score - row.m);
  row.l += weight;
  for (std::size_t i = 0; i < value.size(); ++i) {
    row.acc[i] += weight * value[i];
    if (std::isfinite(value[i])) {
      row.max_abs_value = std::max(row.max_abs_value, std::abs(value[i]));
    }
  }
}

// Adds the keys of `block` to those of `rows` (all of one batch entry) that see them.
void add_keys(const Problem& problem, TensorSource& key, TensorSource& value, const Block& block,
              std::span<Row*> rows, const KeysSeen& seen) {
  const LoadedBlock keys(key, block);
  const LoadedBlock values(value, block);
  std::vector<double> k(static_cast<std::size_t>(problem.head_dim));
  std::vector<double> v(k.size());
  for (std::int64_t head = block.heads.begin; head < block.heads.end; ++head) {
    std::vector<Row*> users;
    std::copy_if(rows.begin(), rows.end(), std::back_inserter(users),
                 [head](const Row* row) { return row->kv_head == head; });
    if (users.empty()) continue;
    for (std::int64_t token = block.tokens.begin; token < block.tokens.end; ++token) {
      keys.copy_vector(token, head, k);
      values.copy_vector(token, head, v);
      std::int64_t added = 0;
      for (Row* row : users) {
        if (token >= row->visible_keys) continue;
        add_key(problem, k, v, *row);
        ++added;
      }
      if (seen) seen(added);
    }
  }
}

// One pass over K and V of one batch entry.
void add_batch(const Problem& problem, TensorSource& key, TensorSource& value, std::span<Row*> rows,
               std::int64_t buffer_bytes, const KeysSeen& seen) {
  const auto by_head = [](const Row* a, const Row* b) { return a->kv_head < b->kv_head; };
  const auto [low, high] = std::minmax_element(rows.begin(), rows.end(), by_head);
  const Range heads{(*low)->kv_head, (*high)->kv_head + 1};
  std::int64_t end = 0;
  for (const Row* row : rows) end = std::max(end, row->visible_keys);
  const auto token_bytes = [&heads](const TensorDesc& desc) {
    return desc.readable_heads(heads).size() * desc.dim * size_of(storage_type(desc.dtype));
  };
  const std::int64_t step = std::max<std::int64_t>(
      1, buffer_bytes / (token_bytes(key.desc()) + token_bytes(value.desc())));
  for (std::int64_t begin = 0; begin < end; begin += step) {
    const Range tokens{begin, std::min(begin + step, end)};
    add_keys(problem, key, value, {rows.front()->index.batch, tokens, heads}, rows, seen);
  }
}

ReferenceRow finish_row(const Row& row) {
  ReferenceRow reference;
  reference.max_abs_value = row.max_abs_value;
  reference.max_score_magnitude = row.max_score_magnitude;
  reference.output = row.acc;
  reference.lse = -infinity;
  if (row.visible_keys == 0) return reference;
  for (double& value : reference.output) value /= row.l;
  reference.lse = row.m + std::log(row.l);
  return reference;
}

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

std::vector<ReferenceRow> reference_rows(const Problem& problem, TensorSource& query,
                                         TensorSource& key, TensorSource& value,
                                         std::span<const RowIndex> rows, std::int64_t buffer_bytes,
                                         const KeysSeen& seen) {
  std::vector<Row> states;
  states.reserve(rows.size());
  for (const RowIndex& index : rows) states.push_back(start_row(problem, query, index));
  std::vector<Row*> order;
  for (Row& row : states) order.push_back(&row);
  const auto batch = [](const Row* row) { return row->index.batch; };
  std::ranges::stable_sort(order, {}, batch);
  for (auto begin = order.begin(); begin != order.end();) {
    const auto end = std::ranges::upper_bound(begin, order.end(), batch(*begin), {}, batch);
    add_batch(problem, key, value, {begin, end}, buffer_bytes, seen);
    begin = end;
  }
  std::vector<ReferenceRow> references;
  references.reserve(states.size());
  for (const Row& row : states) references.push_back(finish_row(row));
  return references;
}

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
