// The sizes of a plan's arenas for one choice of c and head groups.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// Host cache blocks that a run needs, and those that keep the readers ahead of the copies.
constexpr std::int64_t minimum_blocks = 3;
constexpr std::int64_t read_ahead_blocks = 8;

/// Spends `room` bytes on more of `count`, which take `bytes` each, up to `most`.
inline void spend(std::int64_t& room, std::int64_t& count, std::int64_t most, std::int64_t bytes) {
  if (bytes == 0 || count >= most) return;
  const std::int64_t more = std::min(most - count, std::max<std::int64_t>(room, 0) / bytes);
  count += more;
  room -= more * bytes;
}

/// One choice of c (or the grid of tiles) and head groups, and the extents that every size follows
/// from.
struct Cut {
  std::optional<Grid> grid;      ///< of tiles
  std::int64_t c = 1;            ///< chunks
  std::int64_t quorums = 1;      ///< c, or as many as there are tiles
  std::int64_t quorum_size = 1;  ///< k, 1 of tiles: query chunks of a quorum, and key chunks
  std::int64_t pairs = 1;        ///< of a quorum: c, 1 of tiles
  std::int64_t partials = 1;     ///< that a query chunk may have: k, or columns of tiles
  std::int64_t tile = 1;
  std::int64_t groups = 1;
  std::int64_t group_heads = 1;         ///< key/value heads of the largest group
  std::int64_t query_chunk_tokens = 1;  ///< of the largest chunk
  std::int64_t key_chunk_tokens = 1;
  std::int64_t query_chunks = 1;  ///< that are not empty
  std::int64_t key_chunks = 1;
  std::int64_t subproblems = 1;

  /// Chunks of which a quorum computes partials; of two chunks each is the queries of one quorum
  /// and keys of both.
  std::int64_t queries_of_quorum() const {
    return c == 2 && !grid ? 1 : std::min(quorum_size, query_chunks);
  }
  /// Whether head groups can be the inner loop: see ScheduleOrder.
  bool has_orders() const { return groups > 1 && !grid; }
};

Cut cut_of(const PlanRequest& request, std::int64_t c, std::int64_t groups);
Cut cut_of(const PlanRequest& request, const Grid& grid, std::int64_t groups);
/// That of a plan.
Cut cut_of(const Plan& plan);

/// Whether rows of outputs hold heads of several head groups: these are staged, and the last group
/// puts the whole rows where they belong.
bool puts_rows_in_order(const PlanRequest& request, std::int64_t groups);

/// The fewest slots that every subproblem fits: the chunks of one quorum.
DeviceArena minimum_device_arena(const PlanRequest& request, const Cut& cut);

/// The fewest slots with which subproblems can be computed in parts: one query chunk at a time,
/// with all of its keys. See Pipeline.
DeviceArena smallest_device_arena(const PlanRequest& request, const Cut& cut);

/// Twice as many as the minimum: one quorum is copied in while another computes. Never more slots
/// than chunks.
DeviceArena preferred_device_arena(const PlanRequest& request, const Cut& cut);

/// The arena for the budget: between smallest, minimum and preferred where it is short; where it is
/// larger, more query and key/value slots in proportion, up to the chunks of two consecutive head
/// groups. Of tiles more key/value slots alone: a row's queries are not needed again.
DeviceArena device_arena(const PlanRequest& request, const Cut& cut);

/// The arena that holds all accumulators beside the slots that let copies overlap: for every query
/// chunk of a head group (of tiles for one) a state slot, and one for each partial of a quorum on
/// its way there, since one quorum's are merged before the next computes. Output slots take what
/// one quorum may finish, and one more. More query and key/value slots where the budget allows, as
/// in device_arena(). None where the device does not merge, the budget does not hold it, or the
/// request's workers must share the subproblems of a head group.
std::optional<DeviceArena> accumulating_device_arena(const PlanRequest& request, const Cut& cut);

/// Whether several workers are kept about equally busy where each takes whole head groups of a
/// batch entry, and merges these on its device.
bool shares_by_groups(const PlanRequest& request, std::int64_t groups);

/// A host arena and what its sizes mean.
struct HostLayout {
  HostArena arena;
  AccumulatorPlacement placement = AccumulatorPlacement::memory;
  std::int64_t scratch_bytes = 0;
  std::int64_t query_block_tokens = 1;
  std::int64_t key_block_tokens = 1;
  std::int64_t piece_tokens = 1;
};

/// The smallest host budget for which host_layout() succeeds.
std::int64_t smallest_host_bytes(const PlanRequest& request, const Cut& cut);

/// The host arena for the budget, none when nothing fits. Accumulators are on the host.
std::optional<HostLayout> host_layout(const PlanRequest& request, const Cut& cut,
                                      ScheduleOrder order);

/// The host arena where accumulators are on the device and head groups in the outer loop. It fits
/// every budget that host_layout() does.
std::optional<HostLayout> device_accumulators_layout(const PlanRequest& request, const Cut& cut);

/// Estimated bytes moved by a whole run.
struct Traffic {
  double read = 0;        ///< from files
  double copied_in = 0;   ///< to the device
  double copied_out = 0;  ///< partials, or finished rows, from the device
  double spilled = 0;     ///< accumulators to and from the scratch file
  double written = 0;     ///< outputs
};

/// Partials of a query chunk, on average.
double partials_per_row(const Problem& problem, const Cut& cut);

Traffic estimate_traffic(const PlanRequest& request, const Cut& cut, ScheduleOrder order,
                         const DeviceArena& device, const HostLayout& host);
/// The same of a plan.
Traffic estimate_traffic(const Plan& plan);

/// Bytes read from files for so many head groups of a batch entry, the rows of which are in no
/// cache before.
double estimate_reads(const Plan& plan, std::int64_t groups);

}  // namespace stream_cqsa
