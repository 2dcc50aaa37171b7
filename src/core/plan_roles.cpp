// The arenas of a plan on the ranks of a run that share it.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "core/plan_sizes.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa {
namespace {

constexpr std::int64_t minimum_buffers = 3;
// One for partials that are merged as they come, and one for those that are dropped.
constexpr std::int64_t merging_state_buffers = 2;
// In memory, where the others are in a file: each merge thread has one open.
constexpr std::int64_t file_accumulators = 4;
// Of the host budget, for partials, or finished rows, on their way.
constexpr std::int64_t largest_buffer_share = 4;
// Input rows for a worker: some that are sent, and some that are read meanwhile.
constexpr std::int64_t served_blocks = 3;
// For partials of which nothing is kept, at most.
constexpr std::int64_t rehearsed_bytes = std::int64_t{64} << 20;

std::int64_t pieces_of_chunk(const Plan& plan, const Cut& cut) {
  return ceil_div(cut.query_chunk_tokens, plan.piece_tokens);
}

std::int64_t pieces_of_quorum(const Plan& plan, const Cut& cut) {
  return std::min(cut.quorum_size, cut.query_chunks) * pieces_of_chunk(plan, cut);
}

// Pieces with accumulators of one head group, or of all where they are open at once; of tiles those
// of the largest row. At least one.
std::int64_t open_pieces(const Plan& plan) {
  if (plan.division.most_partials() == 1) return 1;  // nothing to merge with
  const bool by_rows = plan.division.scheme() == Scheme::tiles;
  std::int64_t pieces = 0;
  for (std::int64_t chunk = plan.merged_chunks.begin; chunk < plan.merged_chunks.end; ++chunk) {
    const Range queries = plan.division.chunk(chunk).queries;
    if (!plan.problem().sees_keys(queries)) continue;
    const std::int64_t own = ceil_div(queries.size(), plan.piece_tokens);
    pieces = by_rows ? std::max(pieces, own) : pieces + own;
  }
  const bool inner = plan.order == ScheduleOrder::groups_inner;
  return std::max<std::int64_t>(
      1, pieces * (inner ? static_cast<std::int64_t>(plan.groups.size()) : 1));
}

// Cache blocks that hold the rows of a quorum.
std::int64_t blocks_of_quorum(const Plan& plan, const Cut& cut) {
  return std::min(cut.quorum_size, cut.query_chunks) *
             ceil_div(cut.query_chunk_tokens, plan.query_block_tokens) +
         2 * std::min(cut.quorum_size, cut.key_chunks) *
             ceil_div(cut.key_chunk_tokens, plan.key_block_tokens);
}

// Cache blocks that hold all rows of two batch entries, or head groups where these are read alone.
std::int64_t most_blocks(const Plan& plan, const Cut& cut) {
  const PlanRequest& request = plan.request;
  const auto blocks = [&](const InputTraits& input, std::int64_t chunks, std::int64_t tokens,
                          std::int64_t block_tokens) -> std::int64_t {
    if (input.resident) return 0;
    const std::int64_t sweeps =
        request.problem.batch * (input.layout == Layout::bshd ? 1 : cut.groups);
    return std::min<std::int64_t>(2, sweeps) * chunks * ceil_div(tokens, block_tokens);
  };
  return blocks(request.query, cut.query_chunks, cut.query_chunk_tokens, plan.query_block_tokens) +
         blocks(request.key, cut.key_chunks, cut.key_chunk_tokens, plan.key_block_tokens) +
         blocks(request.value, cut.key_chunks, cut.key_chunk_tokens, plan.key_block_tokens);
}

void require(const char* what, std::int64_t budget, std::int64_t needed) {
  if (needed <= budget) return;
  throw InputError(fmt::format(
      "{} memory {} is too small for this rank's part of the plan: it needs {} ({} bytes)", what,
      format_bytes(budget), format_bytes(needed), needed));
}

// For its own request: room for the accumulators, where the plan has them on the device.
DeviceArena worker_device(const Plan& own, const Cut& cut) {
  const std::int64_t budget = own.request.device_budget;
  if (own.placement != AccumulatorPlacement::device) {
    require("device", budget, smallest_device_arena(own.request, cut).bytes());
    return device_arena(own.request, cut);
  }
  if (const auto arena = accumulating_device_arena(own.request, cut)) return *arena;
  throw InputError(fmt::format(
      "device memory {} is too small for this rank's part of the plan: the accumulators of a whole "
      "head group",
      format_bytes(budget)));
}

}  // namespace

PlanRequest pinned_request(const Plan& plan) {
  PlanRequest request = plan.request;
  if (request.scheme == Scheme::tiles) {
    request.grid = plan.division.grid();
  } else {
    request.chunks = plan.division.chunk_count();
  }
  request.heads_per_group = std::ranges::max(plan.groups, {}, &HeadGroup::count).count;
  return request;
}

Plan with_host_accumulators(const Plan& plan) {
  if (plan.placement != AccumulatorPlacement::device) return plan;
  PlanRequest request = pinned_request(plan);
  request.host_accumulators = true;
  Plan own = make_plan(request);
  own.groups_done = plan.groups_done;
  return own;
}

Plan within_device(const Plan& plan, std::int64_t device_budget) {
  Plan own = plan;
  own.request.device_budget = device_budget;
  if (own.placement == AccumulatorPlacement::device &&
      !accumulating_device_arena(own.request, cut_of(own))) {
    own = with_host_accumulators(plan);
    own.request.device_budget = device_budget;
  }
  own.device = worker_device(own, cut_of(own));
  return own;
}

Plan rehearsal_plan(const Plan& plan) {
  Plan own = plan;
  own.scratch_bytes = 0;
  HostArena& host = own.host;
  host.accumulators = host.output_buffers = 0;
  host.cache_blocks = std::min(host.cache_blocks, blocks_of_quorum(own, cut_of(own)));
  if (std::exchange(own.placement, AccumulatorPlacement::memory) != AccumulatorPlacement::device)
    return own;
  const Cut cut = cut_of(own);
  own.device = device_arena(own.request, cut);
  const std::int64_t heads = cut.group_heads * own.problem().query_heads_per_kv_head();
  host.state_buffers = minimum_buffers;
  const auto set_pieces = [&](std::int64_t tokens) {
    constexpr std::int64_t alignment = 64;
    own.piece_tokens = tokens;
    host.state_buffer_bytes =
        round_up(softmax_state_bytes(tokens * heads, own.problem().head_dim), alignment);
  };
  set_pieces(own.piece_tokens);
  while (host.bytes() > own.request.host_budget && own.piece_tokens > 1)
    set_pieces(ceil_div(own.piece_tokens, 2));
  require("host", own.request.host_budget, host.bytes());
  std::int64_t room = own.request.host_budget - host.bytes();
  spend(room, host.state_buffers,
        std::min(2 * pieces_of_quorum(own, cut), rehearsed_bytes / host.state_buffer_bytes),
        host.state_buffer_bytes);
  return own;
}

Plan worker_plan(const Plan& plan, const DeviceTraits& device, std::int64_t device_budget,
                 std::int64_t host_budget) {
  Plan own = plan;
  own.request.device = device;
  own.request.device.tile = plan.request.device.tile;  // which the chunks were cut with
  own.request.device_budget = device_budget;
  own.request.host_budget = host_budget;
  const Cut cut = cut_of(own);
  own.device = worker_device(own, cut);
  own.scratch_bytes = 0;
  const bool by_groups = own.placement == AccumulatorPlacement::device;
  if (!by_groups) own.placement = AccumulatorPlacement::memory;

  HostArena& host = own.host;
  host.output_buffers = host.state_buffers = host.accumulators = 0;
  // For what is on its way: finished rows, or partials.
  std::int64_t& buffers = by_groups ? host.output_buffers : host.state_buffers;
  const std::int64_t buffer_bytes = by_groups ? host.output_buffer_bytes : host.state_buffer_bytes;
  buffers = minimum_buffers;
  const std::int64_t most = most_blocks(own, cut);
  host.cache_blocks = std::min(minimum_blocks, most);
  require("host", host_budget, host.bytes());
  std::int64_t room = host_budget - host.bytes();
  spend(room, host.cache_blocks, std::min(read_ahead_blocks, most), host.cache_block_bytes);
  spend(room, buffers,
        std::min(2 * pieces_of_quorum(own, cut), host_budget / largest_buffer_share / buffer_bytes),
        buffer_bytes);
  spend(room, host.cache_blocks, most, host.cache_block_bytes);
  return own;
}

Plan master_plan(const Plan& plan, std::int64_t workers, bool serves) {
  return merger_plan(plan, workers, {0, plan.division.chunk_count()}, plan.request.host_budget,
                     serves);
}

Plan merger_plan(const Plan& plan, std::int64_t workers, const Range& chunks,
                 std::int64_t host_budget, bool serves) {
  Plan own = plan;
  own.request.host_budget = host_budget;
  own.merged_chunks = chunks;
  own.device = {};
  own.device.kv_slots = plan.device.kv_slots;  // of each worker: it keeps as many chunks
  const Cut cut = cut_of(own);
  const std::int64_t open = open_pieces(own);
  HostArena& host = own.host;
  const std::int64_t most_served = serves ? most_blocks(own, cut) : 0;
  host.cache_blocks = std::min(minimum_blocks, most_served);
  const bool by_groups = plan.placement == AccumulatorPlacement::device;
  // Where rows come finished, one buffer is for those that are dropped.
  host.output_buffers = by_groups ? 2 : std::min<std::int64_t>(1, plan.host.output_buffers);
  host.state_buffers = std::min(merging_state_buffers, plan.host.state_buffers);
  host.accumulators = by_groups ? 0 : open;
  own.scratch_bytes = 0;
  const bool all = chunks.size() == plan.division.chunk_count();
  if (plan.placement == AccumulatorPlacement::file ||
      (!by_groups && host.bytes() > host_budget && own.request.scratch)) {
    host.accumulators = std::min(file_accumulators, open);
    own.placement = AccumulatorPlacement::file;
    own.scratch_bytes = all && plan.scratch_bytes > 0
                            ? plan.scratch_bytes
                            : static_cast<std::int64_t>(plan.groups.size()) * chunks.size() *
                                  pieces_of_chunk(own, cut) *
                                  state_slot_bytes(host.accumulator_bytes);
  }
  require("host", host_budget, host.bytes());
  // What the plan has, then more.
  std::int64_t room = host_budget - host.bytes();
  spend(room, host.output_buffers, plan.host.output_buffers, host.output_buffer_bytes);
  spend(room, host.state_buffers, plan.host.state_buffers, host.state_buffer_bytes);
  if (!by_groups)
    spend(room, host.accumulators, all ? plan.host.accumulators : open, host.accumulator_bytes);
  if (serves) {
    const std::int64_t largest = host_budget / largest_buffer_share;
    spend(room, host.cache_blocks,
          std::min({served_blocks * workers, most_served,
                    largest / std::max<std::int64_t>(host.cache_block_bytes, 1)}),
          host.cache_block_bytes);
  }
  // Room for what two subproblems of every worker send, and for what is just passing.
  const std::int64_t passing_subproblems = 2 * workers + 1;
  const std::int64_t passing =
      passing_subproblems *
      std::min(pieces_of_quorum(own, cut), chunks.size() * pieces_of_chunk(own, cut));
  if (by_groups) {
    spend(room, host.output_buffers, passing, host.output_buffer_bytes);
    return own;
  }
  spend(room, host.state_buffers, passing, host.state_buffer_bytes);
  // Head groups overlap: workers go on to the next one while the last of one are computed.
  const std::int64_t sweeps = std::min<std::int64_t>(2, own.problem().batch * cut.groups);
  const std::int64_t pieces = std::min(chunks.size(), cut.query_chunks) * pieces_of_chunk(own, cut);
  // Rows of tiles are begun by what the workers have under way, each in as many as it may have.
  const std::int64_t begun =
      cut.grid ? (passing_subproblems + 2) * pieces_of_chunk(own, cut) : sweeps * pieces;
  spend(room, host.accumulators, std::min(begun, sweeps * pieces), host.accumulator_bytes);
  // A head group's pieces are finished at about the same time, faster than they are written.
  spend(room, host.output_buffers,
        std::min(pieces, own.request.host_budget / largest_buffer_share / host.output_buffer_bytes),
        host.output_buffer_bytes);
  return own;
}

}  // namespace stream_cqsa
