#include "stream_cqsa/problem.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numbers>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr double max_elements = 0x1p48;
constexpr double max_head_scores = 0x1p62;
constexpr double max_scores = 0x1p63;

void require_positive(const char* name, std::int64_t value) {
  if (value < 1) throw InputError(fmt::format("{} is {}; it must be at least 1", name, value));
}

// Sums and products in double: they cannot overflow, and a rounding error at the limits is
// harmless.
void require_countable(const Problem& problem) {
  const auto elements = [&](std::int64_t heads, double length) {
    return static_cast<double>(problem.batch) * static_cast<double>(heads) * length *
           static_cast<double>(problem.head_dim);
  };
  const double sequence = static_cast<double>(problem.queries_before) +
                          static_cast<double>(problem.query_length) +
                          static_cast<double>(problem.queries_after);
  const double largest =
      std::max(elements(problem.query_heads, sequence),
               elements(problem.kv_heads, static_cast<double>(problem.key_length)));
  if (!(largest <= max_elements)) {
    throw InputError(fmt::format(
        "a tensor of {:.3g} elements is too large; at most 2^48 are supported", largest));
  }
  const double head_scores =
      static_cast<double>(problem.query_length) * static_cast<double>(problem.key_length);
  const double scores =
      head_scores * static_cast<double>(problem.batch) * static_cast<double>(problem.query_heads);
  if (!(head_scores <= max_head_scores) || !(scores <= max_scores)) {
    throw InputError(fmt::format(
        "{:.3g} attention scores are too many; at most 2^62 a head and 2^63 in all are supported",
        scores));
  }
}

}  // namespace

Liveness Problem::liveness(Range queries, Range keys) const {
  if (queries.empty() || keys.empty()) return Liveness::dead;
  // Visibility grows with the query, so the last row decides dead and the first decides full.
  if (keys.begin >= visible_keys(queries.end - 1)) return Liveness::dead;
  return keys.end <= visible_keys(queries.begin) ? Liveness::full : Liveness::partial;
}

std::int64_t Problem::live_scores(Range queries, Range keys) const {
  if (queries.empty() || keys.empty()) return 0;
  const std::int64_t width = keys.size();
  if (mask == Mask::none) return queries.size() * width;
  // From row to row one more key is visible: `first` to `last` of this block's, where values
  // below 1 mean none and values from `width` on mean all.
  const std::int64_t first = visible_keys(queries.begin) - keys.begin;
  const std::int64_t last = visible_keys(queries.end - 1) - keys.begin;
  const std::int64_t full_rows = std::max<std::int64_t>(0, last - std::max(first, width) + 1);
  const std::int64_t low = std::max<std::int64_t>(first, 1);
  const std::int64_t high = std::min(last, width - 1);
  if (low > high) return full_rows * width;
  // Unsigned: twice the sum may need the 64th bit.
  const auto twice =
      static_cast<std::uint64_t>(low + high) * static_cast<std::uint64_t>(high - low + 1);
  return full_rows * width + static_cast<std::int64_t>(twice / 2);
}

void validate(const Problem& problem) {
  require_positive("batch", problem.batch);
  require_positive("the number of query heads", problem.query_heads);
  require_positive("the number of key/value heads", problem.kv_heads);
  require_positive("the query length", problem.query_length);
  require_positive("the key length", problem.key_length);
  require_positive("the head dimension", problem.head_dim);
  if (problem.queries_before < 0 || problem.queries_after < 0) {
    throw InputError(fmt::format("{} query rows before and {} after; there are at least 0",
                                 problem.queries_before, problem.queries_after));
  }
  if (problem.query_heads % problem.kv_heads != 0) {
    throw InputError(
        fmt::format("{} query heads cannot share {} key/value heads; the first must be a multiple "
                    "of the second",
                    problem.query_heads, problem.kv_heads));
  }
  if (problem.head_dim > 256) {
    throw InputError(
        fmt::format("the head dimension is {}; at most 256 is supported", problem.head_dim));
  }
  if (!std::isfinite(static_cast<float>(problem.scale * std::numbers::log2e))) {
    throw InputError(fmt::format("the scale is {}; it must be finite", problem.scale));
  }
  require_countable(problem);
}

}  // namespace stream_cqsa
