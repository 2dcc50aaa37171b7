#include "stream_cqsa/reference.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numbers>
#include <tuple>
#include <utility>

#include "cpu/thread_pool.hpp"

namespace stream_cqsa {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

// A row on its way: the softmax state in fp64, scores in natural base.
struct Row {
  RowIndex index;
  std::int64_t kv_head = 0;
  std::int64_t visible_keys = 0;  // the mask's
  std::int64_t seen_keys = 0;
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
    switch (type()) {
      case DType::f16:
        return convert<std::uint16_t>(
            from, to, [values = f16_values()](std::uint16_t bits) { return values[bits]; });
      case DType::bf16:
        return convert<std::uint16_t>(from, to, bf16_to_f32);
      default:
        return convert<float>(from, to, [](float value) { return value; });
    }
  }

 private:
  DType type() const { return storage_type(desc_.dtype); }
  std::int64_t vector_bytes() const { return desc_.dim * size_of(type()); }

  // f16_to_f32() of all there are.
  static const float* f16_values() {
    static const std::vector<float> values = [] {
      std::vector<float> all;
      for (std::uint32_t bits = 0; bits <= 0xffff; ++bits)
        all.push_back(f16_to_f32(static_cast<std::uint16_t>(bits)));
      return all;
    }();
    return values.data();
  }

  template <typename Stored, typename Value>
  static void convert(const std::byte* from, std::vector<double>& to, const Value& value) {
    for (double& element : to) {
      Stored stored;
      std::memcpy(&stored, from, sizeof stored);
      element = value(stored);
      from += sizeof stored;
    }
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

// Two numbers at once, as every processor of 64 bits computes them: sums in two of these do not
// wait for one another, and the compiler need not reorder anything.
using Pair = double __attribute__((vector_size(16)));

Pair pair_at(const double* from) {
  Pair pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair;
}

Pair magnitude_of(Pair pair) {
  using Bits = std::int64_t __attribute__((vector_size(16)));
  constexpr std::int64_t all_but_sign = std::numeric_limits<std::int64_t>::max();
  return reinterpret_cast<Pair>(reinterpret_cast<Bits>(pair) & all_but_sign);
}

// The sums of x[i] y[i] and of their magnitudes.
std::pair<double, double> products(const std::vector<double>& x, const std::vector<double>& y) {
  Pair sums[2] = {}, magnitudes[2] = {};
  std::size_t i = 0;
  for (; i + 4 <= x.size(); i += 4) {
    const Pair low = pair_at(&x[i]) * pair_at(&y[i]);
    const Pair high = pair_at(&x[i + 2]) * pair_at(&y[i + 2]);
    sums[0] += low;
    sums[1] += high;
    magnitudes[0] += magnitude_of(low);
    magnitudes[1] += magnitude_of(high);
  }
  const Pair sum = sums[0] + sums[1], magnitude = magnitudes[0] + magnitudes[1];
  std::pair<double, double> all{sum[0] + sum[1], magnitude[0] + magnitude[1]};
  for (; i < x.size(); ++i) {
    all.first += x[i] * y[i];
    all.second += std::abs(x[i] * y[i]);
  }
  return all;
}

double largest_finite_magnitude(const std::vector<double>& value) {
  Pair largest = {};
  const auto add = [&largest](Pair values) {
    const Pair magnitude = magnitude_of(values);
    const auto is_larger = (magnitude > largest) & (magnitude < infinity);
    largest = is_larger ? magnitude : largest;
  };
  std::size_t i = 0;
  for (; i + 2 <= value.size(); i += 2) add(pair_at(&value[i]));
  if (i < value.size()) add(Pair{value[i], value[i]});
  return std::max(largest[0], largest[1]);
}

void add_key(const Problem& problem, const std::vector<double>& key,
             const std::vector<double>& value, Row& row) {
  auto [score, magnitude] = products(row.query, key);
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
  ++row.seen_keys;
  for (std::size_t i = 0; i < value.size(); ++i) row.acc[i] += weight * value[i];
}

// What two rows with the same query have seen, in one.
void merge_into(Row& row, const Row& other) {
  const double m = std::max(row.m, other.m);
  // Where neither has a score above -infinity there is nothing to rescale.
  const double own = m == -infinity ? 1.0 : std::exp(row.m - m);
  const double theirs = m == -infinity ? 1.0 : std::exp(other.m - m);
  row.m = m;
  row.l = own * row.l + theirs * other.l;
  for (std::size_t i = 0; i < row.acc.size(); ++i) {
    row.acc[i] = own * row.acc[i] + theirs * other.acc[i];
  }
  row.seen_keys += other.seen_keys;
  row.max_abs_value = std::max(row.max_abs_value, other.max_abs_value);
  row.max_score_magnitude = std::max(row.max_score_magnitude, other.max_score_magnitude);
}

// Keys of one batch entry, and the rows, by number, that see those of them that the mask keeps.
struct Segment {
  std::int64_t batch = 0;
  Range keys;
  Range heads;  // key/value heads of the rows
  std::vector<std::size_t> rows;
};

std::vector<Segment> segments_of(const std::vector<Row>& rows, std::span<const RowKeys> wanted) {
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, Segment> segments;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    for (const Range& keys : wanted[i].keys) {
      if (std::min(keys.end, row.visible_keys) <= keys.begin) continue;
      const auto [at, first] = segments.try_emplace(
          {row.index.batch, keys.begin, keys.end},
          Segment{row.index.batch, {keys.begin, keys.begin}, {row.kv_head, row.kv_head + 1}, {}});
      Segment& segment = at->second;
      segment.keys.end = std::max(segment.keys.end, std::min(keys.end, row.visible_keys));
      segment.heads = {std::min(segment.heads.begin, row.kv_head),
                       std::max(segment.heads.end, row.kv_head + 1)};
      segment.rows.push_back(i);
    }
  }
  std::vector<Segment> all;
  for (auto& [place, segment] : segments) all.push_back(std::move(segment));
  return all;
}

// Adds the keys of `block` to those of the segment's rows that see them.
void add_keys(const Problem& problem, TensorSource& key, TensorSource& value, const Block& block,
              const Segment& segment, std::vector<Row>& rows, const KeysSeen& seen) {
  const LoadedBlock keys(key, block);
  const LoadedBlock values(value, block);
  std::vector<double> k(static_cast<std::size_t>(problem.head_dim));
  std::vector<double> v(k.size());
  for (std::int64_t head = block.heads.begin; head < block.heads.end; ++head) {
    std::vector<Row*> users;
    for (const std::size_t i : segment.rows) {
      if (rows[i].kv_head == head) users.push_back(&rows[i]);
    }
    if (users.empty()) continue;
    std::int64_t added = 0;
    for (std::int64_t token = block.tokens.begin; token < block.tokens.end; ++token) {
      keys.copy_vector(token, head, k);
      values.copy_vector(token, head, v);
      const double largest = largest_finite_magnitude(v);
      for (Row* row : users) {
        if (token >= row->visible_keys) continue;
        add_key(problem, k, v, *row);
        row->max_abs_value = std::max(row->max_abs_value, largest);
        ++added;
      }
    }
    if (seen) seen(added);
  }
}

// Keys and values of rows on their way: every `of`th block from the `first` on.
struct Share {
  std::int64_t first = 0;
  std::int64_t of = 1;
  std::int64_t buffer_bytes = 0;
};

void add_share(const Problem& problem, TensorSource& key, TensorSource& value,
               const std::vector<Segment>& segments, const Share& share, std::vector<Row>& rows,
               const KeysSeen& seen) {
  std::int64_t number = 0;
  for (const Segment& segment : segments) {
    const auto token_bytes = [&segment](const TensorDesc& desc) {
      return desc.readable_heads(segment.heads).size() * desc.dim *
             size_of(storage_type(desc.dtype));
    };
    const std::int64_t most = std::max<std::int64_t>(
        1, share.buffer_bytes / (token_bytes(key.desc()) + token_bytes(value.desc())));
    // Blocks for everybody, where there are that few keys.
    const std::int64_t step = std::min(most, ceil_div(segment.keys.size(), share.of));
    for (std::int64_t begin = segment.keys.begin; begin < segment.keys.end; begin += step) {
      if (number++ % share.of != share.first) continue;
      const Range tokens{begin, std::min(begin + step, segment.keys.end)};
      add_keys(problem, key, value, {segment.batch, tokens, segment.heads}, segment, rows, seen);
    }
  }
}

// As many as wanted while the rows, which every one of them has for itself, take little memory.
int threads_for(int wanted, std::size_t rows, std::int64_t head_dim) {
  constexpr std::int64_t most_bytes = std::int64_t{16} << 20;
  const std::int64_t row_bytes = 2 * 8 * head_dim + static_cast<std::int64_t>(sizeof(Row));
  const std::int64_t most = most_bytes / (static_cast<std::int64_t>(rows) * row_bytes + 1);
  return static_cast<int>(
      std::clamp<std::int64_t>(available_threads(wanted), 1, std::max<std::int64_t>(1, most)));
}

ReferenceRow finish_row(const Row& row) {
  ReferenceRow reference;
  reference.max_abs_value = row.max_abs_value;
  reference.max_score_magnitude = row.max_score_magnitude;
  reference.output = row.acc;
  reference.lse = -infinity;
  if (row.seen_keys == 0) return reference;
  for (double& value : reference.output) value /= row.l;
  reference.lse = row.m + std::log(row.l);
  return reference;
}

}  // namespace

std::vector<ReferenceRow> reference_rows(const Problem& problem, TensorSource& query,
                                         TensorSource& key, TensorSource& value,
                                         std::span<const RowKeys> rows, std::int64_t buffer_bytes,
                                         const KeysSeen& seen, int threads) {
  std::vector<Row> states;
  states.reserve(rows.size());
  for (const RowKeys& wanted : rows) states.push_back(start_row(problem, query, wanted.row));
  const std::vector<Segment> segments = segments_of(states, rows);
  ThreadPool pool(threads_for(threads, rows.size(), problem.head_dim));
  const std::int64_t shares = pool.threads();
  std::vector<std::vector<Row>> parts(static_cast<std::size_t>(shares - 1), states);
  parts.push_back(std::move(states));
  pool.run([&](int worker) {
    add_share(problem, key, value, segments, {worker, shares, buffer_bytes / shares},
              parts[static_cast<std::size_t>(worker)], seen);
  });
  std::vector<ReferenceRow> references;
  references.reserve(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    Row& row = parts.front()[i];
    for (std::size_t part = 1; part < parts.size(); ++part) merge_into(row, parts[part][i]);
    references.push_back(finish_row(row));
  }
  return references;
}

std::vector<ReferenceRow> reference_rows(const Problem& problem, TensorSource& query,
                                         TensorSource& key, TensorSource& value,
                                         std::span<const RowIndex> rows, std::int64_t buffer_bytes,
                                         const KeysSeen& seen, int threads) {
  std::vector<RowKeys> whole;
  whole.reserve(rows.size());
  for (const RowIndex& row : rows) whole.push_back({row, {{0, problem.key_length}}});
  return reference_rows(problem, query, key, value, std::span<const RowKeys>(whole), buffer_bytes,
                        seen, threads);
}

}  // namespace stream_cqsa
