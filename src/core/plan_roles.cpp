// The arenas of a plan on the ranks of a run that share it.
#include <fmt/format.h>

#include <algorithm>

#include "core/plan_sizes.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr std::int64_t minimum_blocks = 3;
constexpr std::int64_t read_ahead_blocks = 8;
constexpr std::int64_t minimum_state_buffers = 3;
// One for partials that are merged as they come, and one for those that are dropped.
constexpr std::int64_t merging_state_buffers = 2;
// In memory, where the others are in a file: each merge thread has one open.
constexpr std::int64_t file_accumulators = 4;
// Of the host budget, for partials on their way.
constexpr std::int64_t largest_buffer_share = 4;

std::int64_t pieces_of_chunk(const Plan& plan, const Cut& cut) {
  return ceil_div(cut.query_chunk_tokens, plan.piece_tokens);
}

std::int64_t pieces_of_quorum(const Plan& plan, const Cut& cut) {
  return std::min(cut.quorum_size, cut.query_chunks) * pieces_of_chunk(plan, cut);
}

// Pieces with accumulators of one head group, or of all where they are open at once; at least one.
std::int64_t open_pieces(const Plan& plan) {
  if (plan.division.chunk_count() == 1) return 1;  // nothing to merge with
  std::int64_t pieces = 0;
  for (std::int64_t chunk = plan.merged_chunks.begin; chunk < plan.merged_chunks.end; ++chunk) {
    const Range queries = plan.division.chunk(chunk).queries;
    if (queries.empty() || plan.problem().visible_keys(queries.end - 1) <= 0) continue;
    pieces += ceil_div(queries.size(), plan.piece_tokens);
  }
  const bool inner = plan.order == ScheduleOrder::groups_inner;
  return std::max<std::int64_t>(
      1, pieces * (inner ? static_cast<std::int64_t>(plan.groups.size()) : 1));
}

Cut cut_of(const Plan& plan) {
  return cut_of(plan.request, plan.division.chunk_count(),
                static_cast<std::int64_t>(plan.groups.size()));
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

// Spends `room` bytes on more of `count`, up to `most`.
void spend(std::int64_t& room, std::int64_t& count, std::int64_t most, std::int64_t bytes) {
  if (bytes == 0 || count >= most) return;
  const std::int64_t more = std::min(most - count, std::max<std::int64_t>(room, 0) / bytes);
  count += more;
  room -= more * bytes;
}

}  // namespace

Plan worker_plan(const Plan& plan, const DeviceTraits& device, std::int64_t device_budget,
                 std::int64_t host_budget) {
  Plan own = plan;
  own.request.device = device;
  own.request.device.tile = plan.request.device.tile;  // which the chunks were cut with
  own.request.device_budget = device_budget;
  own.request.host_budget = host_budget;
  const Cut cut = cut_of(own);
  require("device", device_budget, minimum_device_arena(own.request, cut).bytes());
  own.device = device_arena(own.request, cut);
  own.placement = AccumulatorPlacement::memory;
  own.scratch_bytes = 0;

  HostArena& host = own.host;
  host.output_buffers = host.accumulators = 0;
  host.state_buffers = minimum_state_buffers;
  const std::int64_t most = most_blocks(own, cut);
  host.cache_blocks = std::min(minimum_blocks, most);
  require("host", host_budget, host.bytes());
  std::int64_t room = host_budget - host.bytes();
  spend(room, host.cache_blocks, std::min(read_ahead_blocks, most), host.cache_block_bytes);
  spend(room, host.state_buffers,
        std::min(2 * pieces_of_quorum(own, cut),
                 host_budget / largest_buffer_share / host.state_buffer_bytes),
        host.state_buffer_bytes);
  spend(room, host.cache_blocks, most, host.cache_block_bytes);
  return own;
}

Plan master_plan(const Plan& plan, std::int64_t workers) {
  return merger_plan(plan, workers, {0, plan.division.chunk_count()}, plan.request.host_budget);
}

Plan merger_plan(const Plan& plan, std::int64_t workers, const Range& chunks,
                 std::int64_t host_budget) {
  Plan own = plan;
  own.request.host_budget = host_budget;
  own.merged_chunks = chunks;
  own.device = {};
  own.device.kv_slots = plan.device.kv_slots;  // of each worker: it keeps as many chunks
  const Cut cut = cut_of(own);
  const std::int64_t open = open_pieces(own);
  HostArena& host = own.host;
  host.cache_blocks = 0;
  host.output_buffers = std::min<std::int64_t>(1, plan.host.output_buffers);
  host.state_buffers = std::min(merging_state_buffers, plan.host.state_buffers);
  host.accumulators = open;
  own.scratch_bytes = 0;
  const bool all = chunks.size() == plan.division.chunk_count();
  if (plan.placement == AccumulatorPlacement::file ||
      (host.bytes() > host_budget && own.request.scratch)) {
    host.accumulators = std::min(file_accumulators, open);
    own.placement = AccumulatorPlacement::file;
    own.scratch_bytes = all && plan.scratch_bytes > 0
                            ? plan.scratch_bytes
                            : static_cast<std::int64_t>(plan.groups.size()) * chunks.size() *
                                  pieces_of_chunk(own, cut) * host.accumulator_bytes;
  }
  require("host", host_budget, host.bytes());
  // What the plan has, then more.
  std::int64_t room = host_budget - host.bytes();
  spend(room, host.output_buffers, plan.host.output_buffers, host.output_buffer_bytes);
  spend(room, host.state_buffers, plan.host.state_buffers, host.state_buffer_bytes);
  spend(room, host.accumulators, all ? plan.host.accumulators : open, host.accumulator_bytes);
  // Room for the partials of two subproblems of every worker, and for those just passing.
  spend(room, host.state_buffers,
        (2 * workers + 1) *
            std::min(pieces_of_quorum(own, cut), chunks.size() * pieces_of_chunk(own, cut)),
        host.state_buffer_bytes);
  // Head groups overlap: workers go on to the next one while the last of one are computed.
  const std::int64_t sweeps = std::min<std::int64_t>(2, own.problem().batch * cut.groups);
  spend(room, host.accumulators,
        sweeps * std::min(chunks.size(), cut.query_chunks) * pieces_of_chunk(own, cut),
        host.accumulator_bytes);
  return own;
}

}  // namespace stream_cqsa
