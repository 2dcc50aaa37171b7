#include "engine/partial.hpp"

namespace stream_cqsa {

std::int64_t piece_count(const Plan& plan, const Range& queries) {
  return ceil_div(queries.size(), plan.piece_tokens);
}

Range piece_range(const Plan& plan, const PieceKey& key) {
  const Range chunk = plan.division.chunk(key.chunk).queries;
  const std::int64_t begin = chunk.begin + key.piece * plan.piece_tokens;
  return {begin, std::min(begin + plan.piece_tokens, chunk.end)};
}

std::int64_t piece_rows(const Plan& plan, const PieceKey& key) {
  const HeadGroup& group = plan.groups[static_cast<std::size_t>(key.group)];
  return piece_range(plan, key).size() * group.query_heads(plan.problem()).size();
}

}  // namespace stream_cqsa
