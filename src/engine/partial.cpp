#include "engine/partial.hpp"

#include <algorithm>

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

std::int64_t keyless_tokens(const Problem& problem, const Range& queries) {
  // Each token sees one key more than the one before.
  return std::clamp<std::int64_t>(1 - problem.visible_keys(queries.begin), 0, queries.size());
}

std::int64_t pieces_of_group(const Plan& plan) {
  return pieces_of_group(plan, {0, plan.division.chunk_count()});
}

std::int64_t pieces_of_group(const Plan& plan, const Range& chunks) {
  std::int64_t pieces = 0;
  for (std::int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range queries = plan.division.chunk(chunk).queries;
    if (plan.problem().sees_keys(queries)) pieces += piece_count(plan, queries);
  }
  return pieces;
}

std::int64_t finished_bytes(const Plan& plan, const PieceKey& key) {
  return FinishedLayout(plan.problem(), piece_rows(plan, key), plan.request.lse).bytes;
}

FinishedStates finished_at(const Plan& plan, const PieceKey& key, std::byte* buffer) {
  if (!plan.request.lse) return {buffer, nullptr, nullptr};
  const FinishedLayout layout(plan.problem(), piece_rows(plan, key), true);
  return {buffer, reinterpret_cast<float*>(buffer + layout.m_offset),
          reinterpret_cast<float*>(buffer + layout.l_offset)};
}

}  // namespace stream_cqsa
