// Estimated bytes moved by a plan.
#include <algorithm>
#include <cmath>

#include "core/plan_sizes.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa {
namespace {

// Keys that a row of tiles computes with, on average: those that its queries see and, under a
// causal mask, about half of those at its corners.
double keys_per_row(const Problem& problem, const Cut& cut) {
  const auto scores =
      static_cast<double>(problem.live_scores({0, problem.query_length}, {0, problem.key_length}));
  const double seen = scores / static_cast<double>(problem.query_length);
  const auto corners = static_cast<double>(cut.query_chunk_tokens + cut.key_chunk_tokens);
  return std::min(seen + (problem.mask == Mask::causal ? corners / 2 : 0.0),
                  static_cast<double>(problem.key_length));
}

// How often the keys are loaded for a head group's rows of tiles: once by the row that needs most
// of them, and for every other row those that were not kept. Each row goes through the columns from
// the first on: of n slots two pass keys on, and n - 2 keep what they have.
double key_loads_of_rows(const Problem& problem, const Cut& cut, std::int64_t slots) {
  const double rows = static_cast<double>(cut.query_chunks) * keys_per_row(problem, cut) /
                      static_cast<double>(problem.key_length);
  const bool all = slots >= cut.key_chunks;
  const double kept = all ? 1.0
                          : static_cast<double>(std::max<std::int64_t>(slots - 2, 0)) /
                                static_cast<double>(cut.key_chunks - 1);
  return 1.0 + std::max(rows - 1.0, 0.0) * (1.0 - kept);
}

// Of the uses of what a cover's order returns to, the share that misses where a part `kept` of it
// all can stay, and that stays which is used next. Gaps between the uses of a chunk are spread like
// random ones: those shorter than x of their mean, 1 - exp(-x) of all, take 1 - (1 + x) exp(-x) of
// the whole.
double missed_share(double kept) {
  if (kept <= 0) return 1;
  if (kept >= 1) return 0;
  double low = 0, high = 64;
  while (high - low > 1e-3) {
    const double x = (low + high) / 2;
    (1 - (1 + x) * std::exp(-x) < kept ? low : high) = x;
  }
  return std::exp(-low);
}

// How often each of `chunks` is loaded in a sweep over all quorums of k, when there are slots for
// so many: once, and again at its other uses, but where it was in the quorum before or was kept.
// Of `taking_turns` head groups each has its own chunks: then none is in the subproblem before.
double loads_per_chunk(const Problem& problem, const Cut& cut, std::int64_t slots,
                       std::int64_t chunks, std::int64_t taking_turns) {
  const std::int64_t k = std::min(cut.quorum_size, chunks);
  const std::int64_t all = chunks * taking_turns;
  if (slots >= all || k == all) return 1;
  // A causal mask leaves the keys of a quorum's last chunk, and the queries of its first one,
  // without scores, but for those on the diagonal: at one end of a chunk's uses, so that in the
  // next subproblem the one beside it is often no return either.
  const auto others = static_cast<double>(k - 1);
  const double dead = problem.mask != Mask::causal ? 0.0
                      : taking_turns > 1           ? std::min(1.0, others / 2)
                                                   : 1.5;
  const double returns = others - dead;
  if (returns <= 0) return 1;
  // Beside those of a quorum, and of the one before, while other slots are free: see SlotCache.
  const auto missed_beside = [&](std::int64_t quorums) {
    const std::int64_t busy = quorums * k;
    if (slots <= busy || all <= busy) return 1.0;
    return missed_share(static_cast<double>(slots - busy) / static_cast<double>(all - busy));
  };
  const double apart =
      taking_turns > 1 ? 1.0 : 1.0 - static_cast<double>(k) / static_cast<double>(chunks);
  return 1.0 + returns * apart * (missed_beside(1) + missed_beside(2)) / 2;
}

double tensor_bytes(const Problem& problem, std::int64_t heads, std::int64_t tokens) {
  return static_cast<double>(heads) * static_cast<double>(tokens) *
         static_cast<double>(problem.head_dim * size_of(storage_type(problem.dtype)));
}

// How often each chunk is loaded in a sweep.
struct Loads {
  double query = 1;
  double key = 1;
};

Loads loads_of(const Problem& problem, const Cut& cut, ScheduleOrder order,
               const DeviceArena& device) {
  if (cut.grid) return {1.0, key_loads_of_rows(problem, cut, device.kv_slots)};
  const std::int64_t turns = order == ScheduleOrder::groups_inner ? cut.groups : 1;
  return {loads_per_chunk(problem, cut, device.query_slots, cut.query_chunks, turns),
          loads_per_chunk(problem, cut, device.kv_slots, cut.key_chunks, turns)};
}

struct ReadModel {
  const PlanRequest& request;
  const Cut& cut;
  ScheduleOrder order;
  double cache_bytes;
  Loads loads;
  double groups;  // of a batch entry: those that are computed

  // Bytes of a tensor of one batch entry that the schedule returns to.
  double working_set(const InputTraits& input, std::int64_t heads, std::int64_t tokens) const {
    if (input.resident) return 0;
    const double whole = tensor_bytes(request.problem, heads, tokens);
    const bool one_group = input.layout == Layout::bhsd && order == ScheduleOrder::groups_outer;
    return one_group ? whole / static_cast<double>(cut.groups) : whole;
  }

  double reads(const InputTraits& input, std::int64_t heads, std::int64_t tokens,
               double chunk_loads, double all_sets) const {
    if (input.resident) return 0;
    const bool by_rows = input.layout == Layout::bshd;
    const double share = by_rows ? 1.0 : groups / static_cast<double>(cut.groups);
    const double whole = share * tensor_bytes(request.problem, heads, tokens);
    const double quorum_set =
        all_sets * static_cast<double>(cut.quorum_size) / static_cast<double>(cut.c);
    // With bshd, each head group reads whole token rows, unless the group before left them.
    const bool shared = order == ScheduleOrder::groups_inner && cache_bytes >= quorum_set;
    const double passes = chunk_loads * (by_rows && !shared ? groups : 1.0);
    return whole * (1.0 + (passes - 1.0) * missed(chunk_loads, quorum_set, all_sets));
  }

  // Of what is loaded again. What comes once a sweep, in the same order, is kept as far as there is
  // room: so do rows of tiles go through all keys. What comes more often is kept where it is used
  // next, beside the chunks of a quorum.
  double missed(double chunk_loads, double quorum_set, double all_sets) const {
    if (cache_bytes >= all_sets) return 0;
    const double of_sweeps = 1.0 - cache_bytes / all_sets;
    if (cut.grid || chunk_loads <= 1) return of_sweeps;
    const double within = missed_share((cache_bytes - quorum_set) / (all_sets - quorum_set));
    return (of_sweeps + (chunk_loads - 1) * within) / chunk_loads;
  }

  double of_batch_entry() const {
    const Problem& p = request.problem;
    const double sets = working_set(request.query, p.query_heads, p.query_length) +
                        working_set(request.key, p.kv_heads, p.key_length) +
                        working_set(request.value, p.kv_heads, p.key_length);
    if (!(sets > 0)) return 0;
    return reads(request.query, p.query_heads, p.query_length, loads.query, sets) +
           reads(request.key, p.kv_heads, p.key_length, loads.key, sets) +
           reads(request.value, p.kv_heads, p.key_length, loads.key, sets);
  }
};

double cache_bytes_of(const HostArena& host) {
  return static_cast<double>(host.cache_blocks) * static_cast<double>(host.cache_block_bytes);
}

}  // namespace

double partials_per_row(const Problem& problem, const Cut& cut) {
  if (!cut.grid) return static_cast<double>(cut.c == 2 ? cut.queries_of_quorum() : cut.quorum_size);
  const double columns = keys_per_row(problem, cut) / static_cast<double>(cut.key_chunk_tokens);
  return std::clamp(columns, 1.0, static_cast<double>(cut.key_chunks));
}

Traffic estimate_traffic(const PlanRequest& request, const Cut& cut, ScheduleOrder order,
                         const DeviceArena& device, const HostLayout& host) {
  const Problem& p = request.problem;
  const auto batch = static_cast<double>(p.batch);
  const auto query_chunks = static_cast<double>(cut.query_chunks);
  const Loads loads = loads_of(p, cut, order, device);
  const double rows =
      batch * static_cast<double>(p.query_heads) * static_cast<double>(p.query_length);

  Traffic traffic;
  const auto groups = static_cast<double>(cut.groups);
  traffic.read =
      batch *
      ReadModel{request, cut, order, cache_bytes_of(host.arena), loads, groups}.of_batch_entry();
  traffic.copied_in = batch * (loads.query * tensor_bytes(p, p.query_heads, p.query_length) +
                               loads.key * 2 * tensor_bytes(p, p.kv_heads, p.key_length));
  const std::int64_t output_bytes = p.head_dim * size_of(p.output_dtype);
  if (host.placement == AccumulatorPlacement::device) {
    traffic.copied_out = rows * static_cast<double>(output_bytes + (request.lse ? 8 : 0));
  } else {
    traffic.copied_out =
        rows * partials_per_row(p, cut) * static_cast<double>(softmax_state_bytes(1, p.head_dim));
  }
  if (host.placement == AccumulatorPlacement::file) {
    const double open = query_chunks * static_cast<double>(cut.query_chunk_tokens) *
                        static_cast<double>(order == ScheduleOrder::groups_inner ? cut.groups : 1);
    const double held = static_cast<double>(host.arena.accumulators * host.piece_tokens);
    // A merge into an accumulator in the file reads it and writes it.
    traffic.spilled = 2 * traffic.copied_out * (1.0 - std::min(1.0, held / open));
  }
  traffic.written = rows * static_cast<double>(output_bytes + (request.lse ? 4 : 0));
  return traffic;
}

Traffic estimate_traffic(const Plan& plan) {
  const Cut cut = cut_of(plan);
  const HostLayout host{plan.host,
                        plan.placement,
                        plan.scratch_bytes,
                        plan.query_block_tokens,
                        plan.key_block_tokens,
                        plan.piece_tokens};
  return estimate_traffic(plan.request, cut, plan.order, plan.device, host);
}

double estimate_reads(const Plan& plan, std::int64_t groups) {
  const Cut cut = cut_of(plan);
  return ReadModel{plan.request,
                   cut,
                   plan.order,
                   cache_bytes_of(plan.host),
                   loads_of(plan.problem(), cut, plan.order, plan.device),
                   static_cast<double>(groups)}
      .of_batch_entry();
}

}  // namespace stream_cqsa
