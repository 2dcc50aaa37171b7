#include "engine/launched.hpp"

#include <algorithm>

namespace stream_cqsa {

std::int64_t scores_of(const Plan& plan, const Launched& launched, std::int32_t position,
                       Range queries) {
  const auto& pairs = launched.work.pairs;  // ascending by query
  auto pair = std::partition_point(pairs.begin(), pairs.end(),
                                   [&](const ChunkPair& at) { return at.query < position; });
  std::int64_t scores = 0;
  for (; pair != pairs.end() && pair->query == position; ++pair) {
    scores += plan.problem().live_scores(
        queries, launched.work.chunks[static_cast<std::size_t>(pair->key)].keys);
  }
  return scores;
}

}  // namespace stream_cqsa
