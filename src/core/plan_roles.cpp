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
// Of the host budget, for partials on their way.
constexpr std::int64_t largest_buffer_share = 4;
// Input rows for a worker: some that are sent, and some that are read meanwhile.
constexpr std::int64_t served_blocks = 3;

std::int64_t pieces_of_quorum(const Plan& plan, const Cut& cut) {
  return std::min(cut.quorum_size, cut.query_chunks) *
         ceil_div(cut.query_chunk_tokens, plan.piece_tokens);
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

Plan master_plan(const Plan& plan, std::int64_t workers, bool serves) {
  Plan own = plan;
  own.device = {};
  own.device.kv_slots = plan.device.kv_slots;  // of each worker: it keeps as many chunks
  HostArena& host = own.host;
  const std::int64_t most = serves ? most_blocks(own, cut_of(own)) : 0;
  host.cache_blocks = std::min(minimum_blocks, most);
  std::int64_t room = own.request.host_budget - host.bytes();
  if (serves) {
    const std::int64_t largest = own.request.host_budget / largest_buffer_share;
    spend(room, host.cache_blocks,
          std::min({served_blocks * workers, most,
                    largest / std::max<std::int64_t>(host.cache_block_bytes, 1)}),
          host.cache_block_bytes);
  }
  // Room for the partials of two subproblems of every worker, and for those just passing.
  spend(room, host.state_buffers, (2 * workers + 1) * pieces_of_quorum(own, cut_of(own)),
        host.state_buffer_bytes);
  // Head groups overlap: workers go on to the next one while the last of one are computed.
  const Cut cut = cut_of(own);
  const std::int64_t sweeps = std::min<std::int64_t>(2, own.problem().batch * cut.groups);
  spend(room, host.accumulators,
        sweeps * cut.query_chunks * ceil_div(cut.query_chunk_tokens, own.piece_tokens),
        host.accumulator_bytes);
  return own;
}

}  // namespace stream_cqsa
