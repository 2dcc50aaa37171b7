// The cut of a problem and the sizes of its device arena.
#include <bit>

#include "core/plan_sizes.hpp"
#include "stream_cqsa/difference_cover.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa {
namespace {

// The full kernel tile while it gives so many chunks with tokens in them, else the largest power of
// two that does.
std::int64_t tile_for(const PlanRequest& request, std::int64_t length, std::int64_t chunks) {
  std::int64_t tile = request.device.tile;
  while (tile > 1 && ceil_div(length, tile) < chunks) {
    tile = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(tile - 1)));
  }
  return tile;
}

// The largest part that split(length, tile, c, .) gives.
std::int64_t largest_part(std::int64_t length, std::int64_t tile, std::int64_t c) {
  const std::int64_t tiles = ceil_div(length, tile);
  const std::int64_t last = split(length, tile, c, c - 1).size();
  if (c == 1) return last;
  // The last part always has ceil(tiles / c) tiles, but its last tile may be ragged; another part
  // has as many unless that one takes the whole remainder.
  const std::int64_t others = tiles % c == 1 ? tiles / c : ceil_div(tiles, c);
  return std::max(last, std::min(others * tile, length));
}

// Counts between those of `from` and `to`, in proportion, as large as the budget allows.
DeviceArena grow(const DeviceArena& from, const DeviceArena& to, std::int64_t budget) {
  const std::int64_t steps =
      std::max({to.query_slots - from.query_slots, to.kv_slots - from.kv_slots,
                to.state_slots - from.state_slots});
  const auto at = [&](std::int64_t step) {
    DeviceArena arena = from;
    if (step == 0) return arena;
    arena.query_slots += (to.query_slots - from.query_slots) * step / steps;
    arena.kv_slots += (to.kv_slots - from.kv_slots) * step / steps;
    arena.state_slots += (to.state_slots - from.state_slots) * step / steps;
    return arena;
  };
  std::int64_t low = 0;
  std::int64_t high = steps;
  while (low < high) {
    const std::int64_t middle = (low + high + 1) / 2;
    if (at(middle).bytes() <= budget) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return at(low);
}

// More query and key/value slots, up to the chunks of two consecutive head groups.
DeviceArena keep_chunks(const PlanRequest& request, const Cut& cut, const DeviceArena& arena) {
  const std::int64_t sweeps = std::min<std::int64_t>(2, request.problem.batch * cut.groups);
  DeviceArena everything = arena;
  if (!cut.grid) everything.query_slots = std::max(arena.query_slots, sweeps * cut.query_chunks);
  everything.kv_slots = std::max(arena.kv_slots, sweeps * cut.key_chunks);
  return grow(arena, everything, request.device_budget);
}

// The extents of so many query and key chunks, on multiples of cut.tile.
void set_extents(const Problem& problem, const Grid& chunks, std::int64_t groups, Cut& cut) {
  cut.groups = groups;
  cut.group_heads = ceil_div(problem.kv_heads, groups);
  cut.query_chunk_tokens = largest_part(problem.query_length, cut.tile, chunks.rows);
  cut.key_chunk_tokens = largest_part(problem.key_length, cut.tile, chunks.columns);
  cut.query_chunks = std::min(chunks.rows, ceil_div(problem.query_length, cut.tile));
  cut.key_chunks = std::min(chunks.columns, ceil_div(problem.key_length, cut.tile));
  cut.subproblems = problem.batch * groups * cut.quorums;
}

}  // namespace

Cut cut_of(const PlanRequest& request, std::int64_t c, std::int64_t groups) {
  const Problem& problem = request.problem;
  Cut cut;
  cut.c = cut.quorums = cut.pairs = c;
  cut.quorum_size = cut.partials = difference_cover_size(c);
  cut.tile = tile_for(request, std::max(problem.query_length, problem.key_length), c);
  set_extents(problem, {c, c}, groups, cut);
  return cut;
}

Cut cut_of(const PlanRequest& request, const Grid& grid, std::int64_t groups) {
  const Problem& problem = request.problem;
  Cut cut;
  cut.grid = grid;
  cut.c = std::max(grid.rows, grid.columns);
  cut.quorums = grid.rows * grid.columns;
  cut.partials = grid.columns;
  cut.tile = std::min(tile_for(request, problem.query_length, grid.rows),
                      tile_for(request, problem.key_length, grid.columns));
  // Where there are fewer tiles of tokens than rows (columns), the others are empty.
  const Grid used{std::min(grid.rows, ceil_div(problem.query_length, cut.tile)),
                  std::min(grid.columns, ceil_div(problem.key_length, cut.tile))};
  set_extents(problem, used, groups, cut);
  return cut;
}

Cut cut_of(const Plan& plan) {
  const auto groups = static_cast<std::int64_t>(plan.groups.size());
  const Division& division = plan.division;
  return division.scheme() == Scheme::tiles ? cut_of(plan.request, division.grid(), groups)
                                            : cut_of(plan.request, division.chunk_count(), groups);
}

bool puts_rows_in_order(const PlanRequest& request, std::int64_t groups) {
  return request.output_layout == Layout::bshd && groups > 1;
}

DeviceArena minimum_device_arena(const PlanRequest& request, const Cut& cut) {
  const Problem& problem = request.problem;
  const std::int64_t alignment = request.device.slot_alignment;
  const std::int64_t query_heads = cut.group_heads * problem.query_heads_per_kv_head();
  const std::int64_t vector_bytes = problem.head_dim * size_of(storage_type(problem.dtype));
  const std::int64_t key_bytes = cut.key_chunk_tokens * cut.group_heads * vector_bytes;

  DeviceArena arena;
  arena.query_slots = std::min(cut.quorum_size, cut.query_chunks);
  arena.query_slot_bytes = round_up(cut.query_chunk_tokens * query_heads * vector_bytes, alignment);
  arena.kv_slots = std::min(cut.quorum_size, cut.key_chunks);
  arena.kv_slot_bytes = 2 * round_up(key_bytes, alignment);
  arena.state_slots = arena.query_slots;
  arena.state_slot_bytes = round_up(
      softmax_state_bytes(cut.query_chunk_tokens * query_heads, problem.head_dim), alignment);
  arena.workspace_bytes = request.device.workspace_bytes +
                          arena.query_slots * request.device.query_item_bytes +
                          cut.pairs * request.device.key_item_bytes;
  return arena;
}

DeviceArena smallest_device_arena(const PlanRequest& request, const Cut& cut) {
  DeviceArena arena = minimum_device_arena(request, cut);
  arena.query_slots = arena.state_slots = 1;
  return arena;
}

DeviceArena preferred_device_arena(const PlanRequest& request, const Cut& cut) {
  const std::int64_t sweeps = request.problem.batch * cut.groups;
  DeviceArena arena = minimum_device_arena(request, cut);
  arena.query_slots = std::min(2 * arena.query_slots, sweeps * cut.query_chunks);
  arena.kv_slots = std::min(2 * arena.kv_slots, sweeps * cut.key_chunks);
  arena.state_slots = arena.query_slots;
  return arena;
}

DeviceArena device_arena(const PlanRequest& request, const Cut& cut) {
  const DeviceArena minimum = minimum_device_arena(request, cut);
  const DeviceArena preferred = preferred_device_arena(request, cut);
  if (minimum.bytes() > request.device_budget)
    return grow(smallest_device_arena(request, cut), minimum, request.device_budget);
  if (preferred.bytes() > request.device_budget)
    return grow(minimum, preferred, request.device_budget);
  return keep_chunks(request, cut, preferred);
}

bool shares_by_groups(const PlanRequest& request, std::int64_t groups) {
  // With less, sharing the subproblems ends sooner although every partial then goes to the master.
  constexpr double least_busy = 0.8;
  const std::int64_t parts = request.problem.batch * groups;
  const std::int64_t rounds = ceil_div(parts, request.workers);
  return static_cast<double>(parts) >= least_busy * static_cast<double>(rounds * request.workers);
}

std::optional<DeviceArena> accumulating_device_arena(const PlanRequest& request, const Cut& cut) {
  if (!request.device.merges || request.host_accumulators) return std::nullopt;
  if (!shares_by_groups(request, cut.groups)) return std::nullopt;
  const Problem& problem = request.problem;
  const std::int64_t quorum_chunks = std::min(cut.quorum_size, cut.query_chunks);
  const std::int64_t rows =
      cut.query_chunk_tokens * cut.group_heads * problem.query_heads_per_kv_head();
  DeviceArena arena = preferred_device_arena(request, cut);
  // A partial with none to merge with is finished where it lies.
  const std::int64_t open_chunks = cut.grid ? 1 : cut.query_chunks;
  arena.state_slots = cut.partials == 1 ? 1 : open_chunks + quorum_chunks;
  arena.output_slots = std::min(quorum_chunks + 1, problem.batch * cut.groups * cut.query_chunks);
  arena.output_slot_bytes =
      round_up(FinishedLayout(problem, rows, request.lse).bytes, request.device.slot_alignment);
  if (arena.bytes() > request.device_budget) return std::nullopt;
  return keep_chunks(request, cut, arena);
}

}  // namespace stream_cqsa
