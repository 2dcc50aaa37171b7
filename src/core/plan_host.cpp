// The sizes of a plan's host arena.
#include <algorithm>
#include <initializer_list>
#include <limits>

#include "core/plan_sizes.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa {
namespace {

constexpr std::int64_t MiB = 1 << 20;
constexpr std::int64_t alignment = 64;
constexpr std::int64_t minimum_state_buffers = 2;
constexpr std::int64_t minimum_accumulators = 4;
constexpr std::int64_t preferred_output_buffers = 4;
constexpr std::int64_t largest_block = 4 * MiB;
constexpr std::int64_t largest_piece = 2 * MiB;
constexpr std::int64_t largest_copied_share = 64 * MiB;
constexpr std::int64_t largest_written_share = 64 * MiB;
// No single piece or block takes more of the budget than this part while it can be helped.
constexpr std::int64_t budget_share = 32;

// What one cut and order ask of host memory, before the budget is looked at.
struct HostNeeds {
  bool on_device = false;           // accumulators are: finished rows alone come back
  std::int64_t rows_per_token = 1;  // query heads of the largest group
  std::int64_t open_chunks = 1;     // query chunks that are incomplete at once
  bool merged = true;               // some query chunk has more than one partial
  std::int64_t all_chunks = 1;      // accumulator file: of one batch entry, empty ones too
  std::int64_t copied_chunks = 1;   // query chunks of two quorums
  // Bytes of one token of the tensors that are read from files, 0 when there are none.
  std::int64_t query_row_bytes = 0;
  std::int64_t key_row_bytes = 0;
  // Chunks of Q (K and V) worth caching: those of two consecutive batch entries or head groups.
  std::int64_t query_cached_chunks = 0;
  std::int64_t key_cached_chunks = 0;

  std::int64_t row_bytes() const { return std::max(query_row_bytes, key_row_bytes); }
};

// One way to cut a query chunk into pieces.
struct Pieces {
  std::int64_t tokens = 1;
  std::int64_t per_chunk = 1;
  std::int64_t state_bytes = 0;  // 0 with accumulators on the device
  std::int64_t output_bytes = 0;

  // Of what comes from the device.
  std::int64_t copied_bytes() const { return state_bytes > 0 ? state_bytes : output_bytes; }
};

// Query chunks of the rank that merges most of them. Shares have about equal numbers of partials,
// of which the first chunks of a causal mask have fewer.
std::int64_t largest_share(const PlanRequest& request, const Cut& cut) {
  if (request.mergers == 0) return cut.query_chunks;
  const std::int64_t more = request.problem.mask == Mask::causal ? cut.quorum_size : 1;
  return std::min(cut.query_chunks, ceil_div(cut.query_chunks, request.mergers + 1) + more);
}

HostNeeds host_needs(const PlanRequest& request, const Cut& cut, ScheduleOrder order) {
  const Problem& problem = request.problem;
  const std::int64_t vector_bytes = problem.head_dim * size_of(storage_type(problem.dtype));
  const std::int64_t ratio = problem.query_heads_per_kv_head();
  const bool inner = order == ScheduleOrder::groups_inner;
  const std::int64_t batches = std::min<std::int64_t>(2, problem.batch);
  const auto row_bytes = [&](const InputTraits& input, std::int64_t heads_per_kv_head) {
    const bool whole_rows = input.layout == Layout::bshd;
    return (whole_rows ? problem.kv_heads : cut.group_heads) * heads_per_kv_head * vector_bytes;
  };
  const auto copies = [&](const InputTraits& input) {
    if (input.layout == Layout::bshd) return batches;
    if (inner) return batches * cut.groups;
    return std::min<std::int64_t>(2, problem.batch * cut.groups);
  };

  HostNeeds needs;
  needs.rows_per_token = cut.group_heads * ratio;
  const std::int64_t quorum_chunks = std::min(cut.quorum_size, cut.query_chunks);
  const std::int64_t merged_chunks = largest_share(request, cut);
  // Of tiles a row at a time, and the next one.
  const std::int64_t sweep_chunks = cut.grid ? 1 : (inner ? cut.groups : 1) * merged_chunks;
  needs.open_chunks = std::min(problem.batch * cut.groups * merged_chunks,
                               sweep_chunks + std::min(quorum_chunks, merged_chunks));
  needs.merged = cut.partials > 1;
  needs.all_chunks = cut.groups * (cut.grid ? cut.query_chunks : cut.c);
  needs.copied_chunks = 2 * quorum_chunks;
  if (!request.query.resident) {
    needs.query_row_bytes = row_bytes(request.query, ratio);
    needs.query_cached_chunks = copies(request.query) * cut.query_chunks;
  }
  for (const InputTraits* input : {&request.key, &request.value}) {
    if (input->resident) continue;
    needs.key_row_bytes = std::max(needs.key_row_bytes, row_bytes(*input, 1));
    needs.key_cached_chunks += copies(*input) * cut.key_chunks;
  }
  return needs;
}

Pieces pieces_of(const PlanRequest& request, const Cut& cut, const HostNeeds& needs,
                 std::int64_t count) {
  const std::int64_t dim = request.problem.head_dim;
  Pieces pieces;
  pieces.tokens = ceil_div(cut.query_chunk_tokens, count);
  pieces.per_chunk = ceil_div(cut.query_chunk_tokens, pieces.tokens);
  const std::int64_t rows = pieces.tokens * needs.rows_per_token;
  if (needs.on_device) {
    pieces.output_bytes =
        round_up(FinishedLayout(request.problem, rows, request.lse).bytes, alignment);
    return pieces;
  }
  pieces.state_bytes = round_up(softmax_state_bytes(rows, dim), alignment);
  pieces.output_bytes = round_up(rows * dim * size_of(request.problem.output_dtype), alignment);
  if (request.lse) {
    pieces.output_bytes += round_up(rows * static_cast<std::int64_t>(sizeof(float)), alignment);
  }
  return pieces;
}

// Calls visit(pieces), from pieces of about 2 MiB down to single tokens, until it returns true.
template <typename Visit>
void for_each_pieces(const PlanRequest& request, const Cut& cut, const HostNeeds& needs,
                     const Visit& visit) {
  const std::int64_t tokens = cut.query_chunk_tokens;
  const std::int64_t bytes = pieces_of(request, cut, needs, 1).copied_bytes();
  std::int64_t count = std::min(tokens, ceil_div(bytes, largest_piece));
  while (!visit(pieces_of(request, cut, needs, count)) && count < tokens) {
    count = std::min(2 * count, tokens);
  }
}

// As many as pieces can be open at once. A piece that has a single partial is finished in its state
// buffer: without merging the one that a merge thread counts on is enough.
std::int64_t most_accumulators(const HostNeeds& needs, const Pieces& pieces) {
  return needs.merged ? needs.open_chunks * pieces.per_chunk : 1;
}

// The smallest arena with these pieces, without the cache.
HostArena minimum_host_arena(const HostNeeds& needs, const Pieces& pieces,
                             AccumulatorPlacement placement) {
  HostArena arena;
  arena.output_buffers = 1;
  arena.output_buffer_bytes = pieces.output_bytes;
  if (needs.on_device) return arena;
  arena.state_buffers = minimum_state_buffers;
  arena.state_buffer_bytes = pieces.state_bytes;
  arena.accumulators = most_accumulators(needs, pieces);
  if (placement == AccumulatorPlacement::file) {
    arena.accumulators = std::min(arena.accumulators, minimum_accumulators);
  }
  arena.accumulator_bytes = pieces.state_bytes;
  return arena;
}

struct Blocks {
  std::int64_t query_tokens = 1;
  std::int64_t key_tokens = 1;
  std::int64_t bytes = 0;
  std::int64_t most = 0;  // blocks worth having
};

// Equal blocks of at most `limit` bytes, or of one token where that is larger.
Blocks blocks_of(const Cut& cut, const HostNeeds& needs, std::int64_t limit) {
  const auto tokens = [&](std::int64_t chunk, std::int64_t row_bytes) {
    if (row_bytes == 0) return chunk;
    const std::int64_t most = std::clamp<std::int64_t>(limit / row_bytes, 1, chunk);
    return ceil_div(chunk, ceil_div(chunk, most));
  };
  Blocks blocks;
  blocks.query_tokens = tokens(cut.query_chunk_tokens, needs.query_row_bytes);
  blocks.key_tokens = tokens(cut.key_chunk_tokens, needs.key_row_bytes);
  if (needs.row_bytes() == 0) return blocks;
  blocks.bytes = round_up(std::max(blocks.query_tokens * needs.query_row_bytes,
                                   blocks.key_tokens * needs.key_row_bytes),
                          alignment);
  blocks.most = needs.query_cached_chunks * ceil_div(cut.query_chunk_tokens, blocks.query_tokens) +
                needs.key_cached_chunks * ceil_div(cut.key_chunk_tokens, blocks.key_tokens);
  return blocks;
}

std::int64_t minimum_cache_bytes(const Blocks& blocks) {
  return std::min(minimum_blocks, blocks.most) * blocks.bytes;
}

// The largest blocks, of at most `limit` bytes where that can be helped, whose minimum number fits
// `room`; else those whose minimum is smallest, which one-token blocks need not be: their bytes are
// rounded up.
Blocks choose_blocks(const Cut& cut, const HostNeeds& needs, std::int64_t limit,
                     std::int64_t room) {
  std::optional<Blocks> best;
  for (std::int64_t size = largest_block; size >= alignment; size /= 2) {
    const Blocks blocks = blocks_of(cut, needs, size);
    if (size <= limit && minimum_cache_bytes(blocks) <= room) return blocks;
    if (!best || minimum_cache_bytes(blocks) < minimum_cache_bytes(*best)) best = blocks;
  }
  return *best;
}

// The largest pieces that leave room for the rest and are a small part of the budget, else those
// whose minimum is smallest. None when nothing fits in `room` bytes.
std::optional<Pieces> choose_pieces(const PlanRequest& request, const Cut& cut,
                                    const HostNeeds& needs, AccumulatorPlacement placement,
                                    std::int64_t room) {
  std::optional<Pieces> best;
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for_each_pieces(request, cut, needs, [&](const Pieces& pieces) {
    const std::int64_t bytes = minimum_host_arena(needs, pieces, placement).bytes();
    if (bytes <= room && bytes < least) {
      least = bytes;
      best = pieces;
    }
    if (bytes > room || pieces.copied_bytes() > request.host_budget / budget_share) return false;
    best = pieces;
    return true;
  });
  return best;
}

HostLayout fill(const PlanRequest& request, const Cut& cut, const HostNeeds& needs,
                const Pieces& pieces, AccumulatorPlacement placement, std::int64_t block_limit) {
  HostLayout layout;
  HostArena& arena = layout.arena;
  arena = minimum_host_arena(needs, pieces, placement);
  const Blocks blocks = choose_blocks(cut, needs, block_limit, request.host_budget - arena.bytes());
  arena.cache_block_bytes = blocks.bytes;
  arena.cache_blocks = std::min(minimum_blocks, blocks.most);

  std::int64_t room = request.host_budget - arena.bytes();
  const std::int64_t full = needs.on_device ? 0 : most_accumulators(needs, pieces);
  const std::int64_t all_pieces = needs.open_chunks * pieces.per_chunk;
  // What is copied out at once.
  const std::int64_t buffers = std::min(largest_copied_share, request.host_budget / 4) /
                               std::max(pieces.copied_bytes(), std::int64_t{1});
  spend(room, arena.output_buffers,
        std::min(needs.on_device ? buffers : preferred_output_buffers, all_pieces),
        arena.output_buffer_bytes);
  spend(room, arena.state_buffers, std::min(needs.copied_chunks * pieces.per_chunk, buffers),
        arena.state_buffer_bytes);
  spend(room, arena.cache_blocks, std::min(read_ahead_blocks, blocks.most), blocks.bytes);
  spend(room, arena.accumulators, full, arena.accumulator_bytes);
  if (!needs.on_device) {
    // The pieces of a head group are finished at about the same time: merging goes on meanwhile.
    const std::int64_t share = std::min(largest_written_share, request.host_budget / budget_share);
    spend(room, arena.output_buffers, std::min(all_pieces, share / pieces.output_bytes),
          arena.output_buffer_bytes);
  }
  spend(room, arena.cache_blocks, blocks.most, blocks.bytes);

  // A file that nothing would ever go to is none.
  const bool spills = placement == AccumulatorPlacement::file && arena.accumulators < full;
  layout.placement = needs.on_device ? AccumulatorPlacement::device
                     : spills        ? AccumulatorPlacement::file
                                     : AccumulatorPlacement::memory;
  if (layout.placement == AccumulatorPlacement::file) {
    layout.scratch_bytes =
        needs.all_chunks * pieces.per_chunk * state_slot_bytes(pieces.state_bytes);
  }
  layout.query_block_tokens = blocks.query_tokens;
  layout.key_block_tokens = blocks.key_tokens;
  layout.piece_tokens = pieces.tokens;
  return layout;
}

}  // namespace

std::int64_t smallest_host_bytes(const PlanRequest& request, const Cut& cut) {
  // Head groups in the outer loop never need more than in the inner one.
  const HostNeeds needs = host_needs(request, cut, ScheduleOrder::groups_outer);
  const auto placement =
      request.scratch ? AccumulatorPlacement::file : AccumulatorPlacement::memory;
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for_each_pieces(request, cut, needs, [&](const Pieces& pieces) {
    least = std::min(least, minimum_host_arena(needs, pieces, placement).bytes());
    return false;
  });
  return least + minimum_cache_bytes(choose_blocks(cut, needs, 0, 0));
}

namespace {

// The first of the placements that fits.
std::optional<HostLayout> first_layout(const PlanRequest& request, const Cut& cut,
                                       const HostNeeds& needs,
                                       std::initializer_list<AccumulatorPlacement> placements) {
  const std::int64_t limit = std::min(largest_block, request.host_budget / budget_share);
  // A file of accumulators is better than a starved cache; a starved cache is better than failing.
  const std::int64_t all = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t cache_room : {all, std::int64_t{0}}) {
    const std::int64_t cache = minimum_cache_bytes(choose_blocks(cut, needs, limit, cache_room));
    for (const auto placement : placements) {
      if (placement == AccumulatorPlacement::file && !request.scratch) continue;
      const auto pieces =
          choose_pieces(request, cut, needs, placement, request.host_budget - cache);
      if (pieces) return fill(request, cut, needs, *pieces, placement, limit);
    }
  }
  return std::nullopt;
}

}  // namespace

std::optional<HostLayout> host_layout(const PlanRequest& request, const Cut& cut,
                                      ScheduleOrder order) {
  return first_layout(request, cut, host_needs(request, cut, order),
                      {AccumulatorPlacement::memory, AccumulatorPlacement::file});
}

std::optional<HostLayout> device_accumulators_layout(const PlanRequest& request, const Cut& cut) {
  HostNeeds needs = host_needs(request, cut, ScheduleOrder::groups_outer);
  needs.on_device = true;
  return first_layout(request, cut, needs, {AccumulatorPlacement::device});
}

}  // namespace stream_cqsa
