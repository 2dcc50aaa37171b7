// When the schedule uses a chunk next.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "engine/quorum_list.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// Larger than every subproblem's id: the chunk is not used again.
inline constexpr std::int64_t never = std::numeric_limits<std::int64_t>::max();

enum class Side { query, key };

/// The subproblems that use each chunk, found in O(c) when first asked for and kept: at most
/// 4 * c * k bytes for each side asked for, beside some 40 * c. Of tiles, whose uses are rows and
/// columns of the grid, 32 bytes for each chunk. Not thread-safe.
class UseTable {
 public:
  explicit UseTable(const Plan& plan);

  /// The quorums with a live pair whose query (key) chunk is `chunk`, ascending. Valid as long as
  /// this table is.
  QuorumList quorums(Side side, std::int64_t chunk);

  /// The first subproblem after `id` of (batch, group) that uses `chunk` as `side`.
  std::int64_t next(Side side, std::int64_t batch, std::int64_t group, std::int64_t chunk,
                    std::int64_t id);

  /// The same over all groups of the batch entry that are not done before.
  std::int64_t next_of_any_group(Side side, std::int64_t batch, std::int64_t chunk,
                                 std::int64_t id);

 private:
  void find_live_tiles();
  struct Uses {
    bool known = false;
    std::vector<std::int32_t> quorums;
  };
  bool is_live(std::int64_t query, std::int64_t key) const;
  std::vector<std::int32_t> find_quorums(Side side, std::int64_t chunk) const;

  const Plan& plan_;
  // Of tiles: the live columns of each row, and the live rows of each column.
  std::vector<Range> columns_, rows_;
  // Of cyclic quorum sets.
  std::vector<Range> queries_, keys_;  ///< of each chunk: it is compared with all others
  // By position in the cover: the differences d with r(d).query (r(d).key) there.
  std::vector<std::vector<std::int32_t>> by_query_, by_key_;
  std::vector<Uses> of_query_;
  std::vector<Uses> of_key_;
};

}  // namespace stream_cqsa
