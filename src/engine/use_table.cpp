#include "engine/use_table.hpp"

#include <algorithm>

namespace stream_cqsa {

const std::vector<std::int32_t>& UseTable::quorums(Side side, std::int64_t chunk) {
  Uses& uses = (side == Side::query ? of_query_ : of_key_)[static_cast<std::size_t>(chunk)];
  if (!uses.known) {
    const auto quorums = side == Side::query ? plan_.division.quorums_of_query(chunk)
                                             : plan_.division.quorums_of_key(chunk);
    uses.quorums.assign(quorums.begin(), quorums.end());
    uses.known = true;
  }
  return uses.quorums;
}

std::int64_t UseTable::next(Side side, std::int64_t batch, std::int64_t group, std::int64_t chunk,
                            std::int64_t id) {
  const auto& all = quorums(side, chunk);
  // Within one batch entry and group, ids ascend with the quorum in either order of the schedule.
  const auto found = std::partition_point(all.begin(), all.end(), [&](std::int64_t quorum) {
    return plan_.id({batch, group, quorum}) <= id;
  });
  return found == all.end() ? never : plan_.id({batch, group, *found});
}

std::int64_t UseTable::next_of_any_group(Side side, std::int64_t batch, std::int64_t chunk,
                                         std::int64_t id) {
  std::int64_t first = never;
  for (std::size_t group = 0; group < plan_.groups.size(); ++group) {
    first = std::min(first, next(side, batch, static_cast<std::int64_t>(group), chunk, id));
  }
  return first;
}

}  // namespace stream_cqsa
