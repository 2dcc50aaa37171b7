#include "engine/use_table.hpp"

#include <algorithm>

namespace stream_cqsa {

UseTable::UseTable(const Plan& plan) : plan_(plan) {
  const Division& division = plan.division;
  if (division.scheme() == Scheme::tiles) {
    find_live_tiles();
    return;
  }
  const auto chunks = static_cast<std::size_t>(division.chunk_count());
  of_query_.resize(chunks);
  of_key_.resize(chunks);
  queries_.reserve(chunks);
  keys_.reserve(chunks);
  by_query_.resize(static_cast<std::size_t>(division.quorum_size()));
  by_key_.resize(by_query_.size());
  for (std::int32_t i = 0; i < division.chunk_count(); ++i) {
    const Chunk chunk = division.chunk(i);
    queries_.push_back(chunk.queries);
    keys_.push_back(chunk.keys);
    const Responsibility r = division.responsibilities()[static_cast<std::size_t>(i)];
    by_query_[static_cast<std::size_t>(r.query)].push_back(i);
    by_key_[static_cast<std::size_t>(r.key)].push_back(i);
  }
}

void UseTable::find_live_tiles() {
  const Division& division = plan_.division;
  for (std::int64_t i = 0; i < division.chunk_count(); ++i) {
    columns_.push_back(division.live_columns(i));
    rows_.push_back(division.live_rows(i));
  }
}

QuorumList UseTable::quorums(Side side, std::int64_t chunk) {
  const auto at = static_cast<std::size_t>(chunk);
  if (plan_.division.scheme() == Scheme::tiles) {
    const std::int64_t columns = plan_.division.grid().columns;
    if (side == Side::query) return {chunk * columns, 1, columns_[at].size()};
    return {rows_[at].begin * columns + chunk, columns, rows_[at].size()};
  }
  Uses& uses = (side == Side::query ? of_query_ : of_key_)[at];
  if (!uses.known) {
    uses.quorums = find_quorums(side, chunk);
    uses.known = true;
  }
  return QuorumList(uses.quorums);
}

bool UseTable::is_live(std::int64_t query, std::int64_t key) const {
  return plan_.problem().liveness(queries_[static_cast<std::size_t>(query)],
                                  keys_[static_cast<std::size_t>(key)]) != Liveness::dead;
}

std::vector<std::int32_t> UseTable::find_quorums(Side side, std::int64_t chunk) const {
  const auto c = static_cast<std::int64_t>(queries_.size());
  const auto modulo = [c](std::int64_t value) { return value < 0 ? value + c : value; };
  const auto live = [&](std::int64_t d) {
    return side == Side::query ? is_live(chunk, modulo(chunk + d - c))
                               : is_live(modulo(chunk - d), chunk);
  };
  const auto& differences = side == Side::query ? by_query_ : by_key_;
  std::vector<std::int32_t> quorums;
  quorums.reserve(differences.size());
  for (std::size_t position = 0; position < differences.size(); ++position) {
    if (!std::any_of(differences[position].begin(), differences[position].end(), live)) continue;
    const std::int64_t residue = plan_.division.cover().residues[position];
    quorums.push_back(static_cast<std::int32_t>(modulo(chunk - residue)));
  }
  std::sort(quorums.begin(), quorums.end());
  quorums.shrink_to_fit();
  return quorums;
}

std::int64_t UseTable::next(Side side, std::int64_t batch, std::int64_t group, std::int64_t chunk,
                            std::int64_t id) {
  const QuorumList all = quorums(side, chunk);
  // Within one batch entry and group, ids ascend with the quorum in either order of the schedule.
  const auto found = std::partition_point(all.begin(), all.end(), [&](std::int64_t quorum) {
    return plan_.id({batch, group, quorum}) <= id;
  });
  return found == all.end() ? never : plan_.id({batch, group, *found});
}

std::int64_t UseTable::next_of_any_group(Side side, std::int64_t batch, std::int64_t chunk,
                                         std::int64_t id) {
  std::int64_t first = never;
  const auto groups = static_cast<std::int64_t>(plan_.groups.size());
  const std::int64_t done = plan_.groups_done - group_number(plan_, batch, 0);
  for (std::int64_t group = std::max<std::int64_t>(done, 0); group < groups; ++group) {
    first = std::min(first, next(side, batch, group, chunk, id));
  }
  return first;
}

}  // namespace stream_cqsa
