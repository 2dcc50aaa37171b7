#include "stream_cqsa/plan.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#include "core/plan_search.hpp"
#include "core/plan_sizes.hpp"
#include "core/plan_tiles.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/difference_cover.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa {
namespace {

void check_grid(const Problem& problem, const Grid& grid) {
  constexpr double most_subproblems = 0x1p62;
  if (std::min(grid.rows, grid.columns) < 1 || std::max(grid.rows, grid.columns) > max_modulus ||
      grid.rows * grid.columns > most_tiles) {
    throw InputError(fmt::format(
        "a grid of {}x{} tiles; from 1 to {} rows and columns, and {} tiles, are supported",
        grid.rows, grid.columns, max_modulus, most_tiles));
  }
  if (static_cast<double>(problem.batch) * static_cast<double>(problem.kv_heads) *
          static_cast<double>(grid.rows * grid.columns) >
      most_subproblems) {
    throw InputError(
        fmt::format("a grid of {}x{} tiles for each of {} batch entries and {} heads "
                    "is more than 2^62 subproblems",
                    grid.rows, grid.columns, problem.batch, problem.kv_heads));
  }
}

void validate(const PlanRequest& request) {
  validate(request.problem);
  if (request.device.tile < 1 || request.device.slot_alignment < 1 ||
      request.device.workspace_bytes < 0 || request.device.query_item_bytes < 0 ||
      request.device.key_item_bytes < 0 || request.device.overlap_worth < 1 ||
      request.device.overlap_flop < 0 || request.device.threads < 1) {
    throw InputError(fmt::format(
        "device '{}': a tile of {} tokens, an alignment of {} bytes, a workspace of {} bytes, {} "
        "and {} more for each item, an overlap worth {}, {} threads; at least 1, 1, 0, 0, 0, 1 and "
        "1 are needed",
        request.device.kind, request.device.tile, request.device.slot_alignment,
        request.device.workspace_bytes, request.device.query_item_bytes,
        request.device.key_item_bytes, request.device.overlap_worth, request.device.threads));
  }
  if (request.chunks && (*request.chunks < 1 || *request.chunks > max_modulus)) {
    throw InputError(
        fmt::format("{} chunks; from 1 to {} are supported", *request.chunks, max_modulus));
  }
  if (request.grid && request.scheme != Scheme::tiles)
    throw InputError("a grid is one of tiles; cyclic quorum sets have a number of chunks");
  if (request.chunks && request.scheme == Scheme::tiles)
    throw InputError("tiles have a grid, not a number of chunks");
  if (request.grid) check_grid(request.problem, *request.grid);
  constexpr std::int64_t most_workers = 1'000'000;
  if (request.workers < 1 || request.workers > most_workers || request.device.dispatch_flop < 1) {
    throw InputError(
        fmt::format("{} workers, {} operations to dispatch: 1 to {} and at least 1 are supported",
                    request.workers, request.device.dispatch_flop, most_workers));
  }
  if (request.mergers < 0 || request.mergers > most_workers) {
    throw InputError(
        fmt::format("{} mergers; from 0 to {} are supported", request.mergers, most_workers));
  }
  const std::int64_t heads = request.problem.kv_heads;
  if (request.heads_per_group &&
      (*request.heads_per_group < 1 || *request.heads_per_group > heads)) {
    throw InputError(fmt::format("{} heads per group; the problem allows 1 to {} key/value heads",
                                 *request.heads_per_group, heads));
  }
}

// Groups that differ by at most one head.
std::vector<HeadGroup> head_groups(const Problem& problem, std::int64_t count) {
  std::vector<HeadGroup> groups;
  groups.reserve(count);
  for (std::int64_t i = 0; i < count; ++i) {
    const Range heads = split(problem.kv_heads, 1, count, i);
    groups.push_back({heads.begin, heads.size()});
  }
  return groups;
}

struct Schedule {
  ScheduleOrder order = ScheduleOrder::groups_outer;
  DeviceArena device;
  HostLayout host;
};

// Head groups in the outer loop, with the accumulators on the device where that has room.
Schedule outer_schedule(const PlanRequest& request, const Cut& cut) {
  const auto accumulating = accumulating_device_arena(request, cut);
  const auto host = accumulating ? device_accumulators_layout(request, cut)
                                 : host_layout(request, cut, ScheduleOrder::groups_outer);
  if (!host) throw std::logic_error("the cut chosen has no host arena");
  return {ScheduleOrder::groups_outer, accumulating ? *accumulating : device_arena(request, cut),
          *host};
}

// Head groups go in the outer loop, where the fewest accumulators are open, unless going through
// them in the inner one moves fewer bytes between files and memory: token rows of bshd files hold
// all heads, and are then read once for all groups instead of once for each. Workers that take
// whole head groups go through them in the outer one; so do tiles, of which the inner one would
// have a row open for each.
Schedule choose_schedule(const PlanRequest& request, const Cut& cut) {
  const auto inner_schedule = [&]() -> std::optional<Schedule> {
    const auto host = host_layout(request, cut, ScheduleOrder::groups_inner);
    if (!host) return std::nullopt;
    return Schedule{ScheduleOrder::groups_inner, device_arena(request, cut), *host};
  };
  if (cut.has_orders() && request.order == ScheduleOrder::groups_inner) {
    if (const auto inner = inner_schedule()) return *inner;
    throw InputError(fmt::format(
        "host memory {} is too small for all {} head groups at once; leave their order open",
        format_bytes(request.host_budget), cut.groups));
  }
  const Schedule outer = outer_schedule(request, cut);
  const bool by_groups = request.workers > 1 && outer.device.output_slots > 0;
  if (!cut.has_orders() || by_groups || request.order) return outer;
  const auto inner = inner_schedule();
  if (!inner) return outer;
  const auto file_bytes = [&](const Schedule& of) {
    const Traffic traffic = estimate_traffic(request, cut, of.order, of.device, of.host);
    return traffic.read + traffic.spilled;
  };
  return file_bytes(*inner) < file_bytes(outer) ? *inner : outer;
}

}  // namespace

Plan make_plan(const PlanRequest& request) {
  validate(request);
  const Cut cut = choose_cut(request);
  const Schedule schedule = choose_schedule(request, cut);
  const HostLayout& host = schedule.host;
  return {.request = request,
          .division = cut.grid ? Division(request.problem, *cut.grid, cut.tile)
                               : Division(request.problem, cut.c, cut.tile),
          .groups = head_groups(request.problem, cut.groups),
          .order = schedule.order,
          .device = schedule.device,
          .host = host.arena,
          .placement = host.placement,
          .scratch_bytes = host.scratch_bytes,
          .query_block_tokens = host.query_block_tokens,
          .key_block_tokens = host.key_block_tokens,
          .piece_tokens = host.piece_tokens,
          .merged_chunks = {0, cut.c}};
}

std::int64_t Plan::subproblem_count() const {
  return problem().batch * static_cast<std::int64_t>(groups.size()) * division.quorum_count();
}

SubproblemKey Plan::key(std::int64_t id) const {
  const auto group_count = static_cast<std::int64_t>(groups.size());
  const std::int64_t c = division.quorum_count();
  const std::int64_t batch = id / (group_count * c);
  const std::int64_t rest = id % (group_count * c);
  if (order == ScheduleOrder::groups_outer) return {batch, rest / c, rest % c};
  return {batch, rest % group_count, rest / group_count};
}

std::int64_t Plan::id(const SubproblemKey& key) const {
  const auto group_count = static_cast<std::int64_t>(groups.size());
  const std::int64_t c = division.quorum_count();
  if (order == ScheduleOrder::groups_outer) {
    return (key.batch * group_count + key.group) * c + key.quorum;
  }
  return (key.batch * c + key.quorum) * group_count + key.group;
}

std::int64_t Plan::device_bytes(const QuorumWork& work) const {
  std::vector<bool> is_query(work.chunks.size(), false);
  std::vector<bool> is_key(work.chunks.size(), false);
  for (const ChunkPair& pair : work.pairs) {
    is_query[pair.query] = true;
    is_key[pair.key] = true;
  }
  const std::int64_t queries = std::count(is_query.begin(), is_query.end(), true);
  const std::int64_t keys = std::count(is_key.begin(), is_key.end(), true);
  return std::min(queries, device.query_slots) * device.query_slot_bytes +
         std::min(queries, device.state_slots) * device.state_slot_bytes +
         keys * device.kv_slot_bytes;
}

ScheduleForm form_of(const Plan& plan) {
  return {plan.order, plan.placement == AccumulatorPlacement::device};
}

std::int64_t accumulator_file_bytes(const Plan& plan, bool durable) {
  if (!durable) return plan.scratch_bytes;
  return std::max(plan.host.accumulators * state_slot_bytes(plan.host.accumulator_bytes),
                  plan.scratch_bytes);
}

}  // namespace stream_cqsa
