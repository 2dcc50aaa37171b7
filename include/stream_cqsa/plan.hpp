// The plan: the immutable description of a run, computed by arithmetic alone.
#pragma once

#include <algorithm>
#include <array>
#include <compare>
#include <cstdint>
#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

#include "stream_cqsa/divide.hpp"
#include "stream_cqsa/problem.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// What planning needs to know of a device.
struct DeviceTraits {
  std::string kind = "cpu";          ///< "cpu" or "cuda"
  std::string name;                  ///< model, for people
  std::int64_t tile = 128;           ///< chunk boundaries fall on multiples of this many tokens
  std::int64_t slot_alignment = 64;  ///< bytes
  std::int64_t workspace_bytes = 0;  ///< kernel scratch in the device arena, whatever the division
  /// More of it for each query chunk, and each chunk pair, that a subproblem may have.
  std::int64_t query_item_bytes = 0;
  std::int64_t key_item_bytes = 0;
  /// How many times the fewest subproblems it is worth to copy beside the computing.
  std::int64_t overlap_worth = 2;
  /// Floating-point operations that a subproblem should have before the sequence is divided for the
  /// sake of overlap alone, into at most overlap_worth subproblems; 0: it never is.
  std::int64_t overlap_flop = 0;
  /// Floating-point operations for which it is worth to hand a subproblem to another rank.
  std::int64_t dispatch_flop = 200'000'000;
  std::int64_t threads = 2;  ///< of a CPU that compute, for built-in rates
  bool merges = false;       ///< accumulators may stay on the device
  friend bool operator==(const DeviceTraits&, const DeviceTraits&) = default;
};

/// What planning needs to know of one input tensor.
struct InputTraits {
  Layout layout = Layout::bshd;
  bool resident = false;  ///< the whole tensor is in host memory: no host cache for it
  friend bool operator==(const InputTraits&, const InputTraits&) = default;
};

/// Which of head groups and quorums the schedule counts faster.
enum class ScheduleOrder {
  groups_outer,  ///< all quorums of a head group, then the next group: fewest open accumulators
  groups_inner,  ///< all head groups of a quorum, then the next quorum: token rows are read once
};

/// What plans of one division and the same head groups differ in.
struct ScheduleForm {
  ScheduleOrder order = ScheduleOrder::groups_outer;
  bool on_device = false;  ///< accumulators are
  friend auto operator<=>(const ScheduleForm&, const ScheduleForm&) = default;
};
/// All there are: with head groups in the inner loop accumulators are on the host.
inline constexpr std::array<ScheduleForm, 3> schedule_forms = {
    {{ScheduleOrder::groups_outer, true},
     {ScheduleOrder::groups_outer, false},
     {ScheduleOrder::groups_inner, false}}};

/// Everything that a plan follows from.
struct PlanRequest {
  Problem problem;
  DeviceTraits device;
  InputTraits query, key, value;
  Layout output_layout = Layout::bshd;
  bool lse = false;                ///< an lse tensor is written too
  std::int64_t device_budget = 0;  ///< bytes
  std::int64_t host_budget = 0;    ///< bytes
  std::int64_t workers = 1;        ///< that share the subproblems
  std::int64_t mergers = 0;        ///< that share the merging with the master
  bool scratch = false;            ///< accumulators may go to files
  bool host_accumulators = false;  ///< accumulators must not stay on the device
  Scheme scheme = Scheme::cqs;
  std::optional<std::int64_t> chunks;           ///< with cqs: c, else chosen
  std::optional<Grid> grid;                     ///< with tiles, else chosen
  std::optional<std::int64_t> heads_per_group;  ///< most key/value heads per group, else chosen
  /// Of several head groups and quorums, else chosen. With groups_inner accumulators are not on the
  /// device.
  std::optional<ScheduleOrder> order;
  friend bool operator==(const PlanRequest&, const PlanRequest&) = default;
};

/// The device arena, in this order: query slots, key/value slots, state slots, output slots,
/// workspace. A query slot holds Q of one chunk, a key/value slot K then V of one chunk (each
/// rounded up to the alignment), a state slot the softmax states of one query chunk; all for one
/// head group. Output slots are there with accumulators on the device alone: each holds the O of
/// one query chunk and, where an lse is written, its m and l, see FinishedLayout.
struct DeviceArena {
  std::int64_t query_slots = 0, query_slot_bytes = 0;
  std::int64_t kv_slots = 0, kv_slot_bytes = 0;
  std::int64_t state_slots = 0, state_slot_bytes = 0;
  std::int64_t output_slots = 0, output_slot_bytes = 0;
  std::int64_t workspace_bytes = 0;

  std::int64_t query_offset() const { return 0; }
  std::int64_t kv_offset() const { return query_slots * query_slot_bytes; }
  std::int64_t state_offset() const { return kv_offset() + kv_slots * kv_slot_bytes; }
  std::int64_t output_offset() const { return state_offset() + state_slots * state_slot_bytes; }
  std::int64_t workspace_offset() const {
    return output_offset() + output_slots * output_slot_bytes;
  }
  std::int64_t bytes() const { return workspace_offset() + workspace_bytes; }
  /// How many query chunks of a subproblem that has `chunks` of them one launch computes: all where
  /// there are slots for them, else as many as half of the slots hold, so that the others are
  /// filled and emptied meanwhile.
  std::int64_t queries_at_once(std::int64_t chunks) const {
    const std::int64_t slots = std::min(query_slots, state_slots);
    return chunks <= slots ? chunks : std::max<std::int64_t>(1, slots / 2);
  }
  friend bool operator==(const DeviceArena&, const DeviceArena&) = default;
};

/// Rows whose last partial is merged, in an output slot of the device or on the host: O, [row][dim]
/// in the output type, from the start; where an lse is written, m and l [row] behind it.
struct FinishedLayout {
  std::int64_t m_offset = 0;
  std::int64_t l_offset = 0;
  std::int64_t bytes = 0;

  FinishedLayout(const Problem& problem, std::int64_t rows, bool lse)
      : m_offset(round_up(rows * problem.head_dim * size_of(problem.output_dtype), 64)),
        l_offset(m_offset + rows * static_cast<std::int64_t>(sizeof(float))),
        bytes(lse ? 2 * l_offset - m_offset : m_offset) {}
};

/// The host arena, in this order: cache blocks, state buffers, output buffers, accumulators. All
/// before the accumulators is copied to or from the device. With accumulators on the device there
/// are neither state buffers nor accumulators here, and output buffers hold m and l for the lse.
struct HostArena {
  std::int64_t cache_blocks = 0, cache_block_bytes = 0;      ///< input rows as read from files
  std::int64_t state_buffers = 0, state_buffer_bytes = 0;    ///< pieces of partials to be merged
  std::int64_t output_buffers = 0, output_buffer_bytes = 0;  ///< finished rows and their lse
  std::int64_t accumulators = 0, accumulator_bytes = 0;  ///< pieces of accumulators held in memory

  std::int64_t cache_offset() const { return 0; }
  std::int64_t state_offset() const { return cache_blocks * cache_block_bytes; }
  std::int64_t output_offset() const { return state_offset() + state_buffers * state_buffer_bytes; }
  std::int64_t accumulator_offset() const {
    return output_offset() + output_buffers * output_buffer_bytes;
  }
  std::int64_t bytes() const { return accumulator_offset() + accumulators * accumulator_bytes; }
  friend bool operator==(const HostArena&, const HostArena&) = default;
};

enum class AccumulatorPlacement {
  memory,  ///< every open accumulator fits HostArena::accumulators
  file,    ///< those that do not fit lie in a file under the scratch directory
  device,  ///< every open accumulator has a state slot: no partial leaves the device
};

/// Where a subproblem stands in the plan.
struct SubproblemKey {
  std::int64_t batch = 0;
  std::int64_t group = 0;   ///< into Plan::groups
  std::int64_t quorum = 0;  ///< i of S_i, or of a tile
  friend bool operator==(const SubproblemKey&, const SubproblemKey&) = default;
};

struct Plan {
  static constexpr int version = 1;

  PlanRequest request;
  Division division;
  std::vector<HeadGroup> groups;
  ScheduleOrder order = ScheduleOrder::groups_outer;
  DeviceArena device;
  HostArena host;
  AccumulatorPlacement placement = AccumulatorPlacement::memory;
  std::int64_t scratch_bytes = 0;       ///< of the accumulator file, 0 for none
  std::int64_t query_block_tokens = 0;  ///< tokens of Q per host cache block
  std::int64_t key_block_tokens = 0;    ///< tokens of K or V per host cache block
  std::int64_t piece_tokens = 0;        ///< query tokens per piece of a partial
  Range merged_chunks;                  ///< query chunks that this rank merges, see merger_plan()
  /// Head groups of batch entries, numbered by group_number(), before this one are finished when
  /// the run begins, see plan_again().
  std::int64_t groups_done = 0;

  const Problem& problem() const { return request.problem; }

  /// Subproblems are numbered 0 .. subproblem_count() - 1 in schedule order, which is also the
  /// canonical merge order of every query chunk.
  std::int64_t subproblem_count() const;
  SubproblemKey key(std::int64_t id) const;
  std::int64_t id(const SubproblemKey& key) const;

  /// The live work of subproblem `id`, generated when asked for. It may be empty.
  QuorumWork work(std::int64_t id) const { return division.work(key(id).quorum); }

  /// Bytes of device slots that this work occupies, or a part of it where it is computed in parts.
  std::int64_t device_bytes(const QuorumWork& work) const;
};

ScheduleForm form_of(const Plan& plan);

/// Bytes of accumulators that a run of `plan` may have in a file: those that memory does not hold,
/// and if it is `durable`, with a checkpoint, one version of all that are open.
std::int64_t accumulator_file_bytes(const Plan& plan, bool durable);

/// The number of a head group of a batch entry. With groups_outer its subproblems, as many as there
/// are quorums, are those from quorums * number on.
inline std::int64_t group_number(const Plan& plan, std::int64_t batch, std::int64_t group) {
  return batch * static_cast<std::int64_t>(plan.groups.size()) + group;
}

/// The head groups of all batch entries.
inline std::int64_t group_total(const Plan& plan) {
  return group_number(plan, plan.problem().batch, 0);
}

/// The plan with the fewest subproblems that fits the budgets. Where up to
/// DeviceTraits::overlap_worth times as many, on kernel tiles no smaller, leave room on the device
/// to copy one quorum in while another computes, the fewest that do are taken instead, or, where
/// DeviceTraits::overlap_flop asks for it, as many as keep the copies at both ends short. So a
/// larger device budget never gives more than that times the subproblems of a smaller one, but for
/// several workers: they get enough subproblems each to end at about the same time. Where it
/// then holds the accumulators too, they stay on the device. Equal requests give equal plans.
/// Where the device has no room for the quorums of any division, the fewest subproblems that it can
/// compute in parts (see worker_plan()), which may be fewer than the fewest of whole quorums.
/// Throws InputError when nothing fits; the message names the smallest budget that works, whether
/// the device's or the host's is short, and what a scratch directory would spare.
///
/// With tiles, those that move the fewest bytes while the keys of one are copied beside the
/// computing of another; a head group's are computed row by row, so that one row's accumulators are
/// open at a time.
Plan make_plan(const PlanRequest& request);

/// The plan on a rank that only computes, within budgets of its own: a device arena, and on the
/// host cache blocks and buffers for partials that are sent. `device` is its device. Division and
/// pieces are the plan's. Where the device has no room for a whole subproblem there are fewer query
/// and state slots than a quorum has chunks, but at least one. Throws InputError when a budget is
/// too small, naming what it takes. Where the plan has accumulators on the device they are on that
/// of this rank, which takes whole head groups.
Plan worker_plan(const Plan& plan, const DeviceTraits& device, std::int64_t device_budget,
                 std::int64_t host_budget);

/// The plan on the rank that merges what `workers` others compute: no device memory, and more
/// buffers for partials where the host budget has room. No cache blocks, but where it `serves` the
/// inputs: then they are buffers for rows on their way. Where the plan's accumulators are on
/// devices, those of the workers, finished rows come and are only written. Throws InputError as
/// merger_plan().
Plan master_plan(const Plan& plan, std::int64_t workers, bool serves = false);

/// The same on one of several ranks that merge, within a host budget of its own: accumulators and
/// buffers for the query chunks `chunks` alone. They go to a file where they do not fit and the
/// request has a scratch directory. Throws InputError when the budget is too small, naming what it
/// takes.
Plan merger_plan(const Plan& plan, std::int64_t workers, const Range& chunks,
                 std::int64_t host_budget, bool serves = false);

/// The request of which make_plan() makes the plan's division and head groups, whatever the
/// budgets: nothing of these is left open.
PlanRequest pinned_request(const Plan& plan);

/// The same chunks and head groups with accumulators on the host, where the plan has them on the
/// device; else the plan. Throws InputError when the host budget is too small.
Plan with_host_accumulators(const Plan& plan);

/// The plan of one rank for a device that has only `device_budget` bytes by now: the same chunks,
/// and so the same bits. A subproblem is computed in parts where the device has no room for all of
/// it, and accumulators go to the host where they no longer fit. Throws InputError when a budget is
/// too small for that.
Plan within_device(const Plan& plan, std::int64_t device_budget);

/// The plan of one rank for computing some subproblems and keeping nothing: the same division, with
/// the device arena of a run that has its accumulators on the host, cache blocks for a quorum at
/// most, and buffers for partials, but neither accumulators nor output buffers. Where the plan has
/// accumulators on the device, pieces may be shorter, so as to fit the host budget. Throws
/// InputError, naming what it takes, where even the shortest do not.
Plan rehearsal_plan(const Plan& plan);

/// The smallest device budget with which make_plan() takes a request that is otherwise this one.
/// Throws InputError when the host budget is too small for any.
std::int64_t smallest_device_budget(const PlanRequest& request);

/// The smallest host budget, as above. Throws InputError when the device budget is too small for
/// any.
std::int64_t smallest_host_budget(const PlanRequest& request);

/// The table that `plan` prints.
std::string describe(const Plan& plan);

/// `plan --json`. With `subproblems`, every subproblem with its live pairs.
/// Written piece by piece, so that a long list is never held.
void write_json(const Plan& plan, bool subproblems, std::ostream& out);

/// Traits as text, and back: for another process. The latter throws InputError for anything else.
std::string to_json_text(const DeviceTraits& traits);
DeviceTraits device_traits_from_json(const std::string& text);

/// Reads what write_json wrote: makes the plan again from the problem, options and budgets in it.
/// Throws InputError, naming `name` and what differs (or the line and column that are no JSON),
/// unless everything else in it is what that gives; a list of subproblems, and what
/// plan_choice.hpp writes beside a plan, is skipped.
Plan read_plan(std::istream& in, const std::string& name);

/// What of a problem, device or tensors is not as a plan was made for it, by the names that
/// write_json gives: "for head_dim 64, the input has 128; for mask causal, this run has none".
/// Empty where a plan made from `planned` can run as `given` wants; budgets and division are the
/// plan's own.
std::string mismatch(const PlanRequest& planned, const PlanRequest& given);

/// The chunk-pair matrix coloured by quorum, dead pairs blank, beside planned memory and budgets.
void write_svg(const Plan& plan, std::ostream& out);

}  // namespace stream_cqsa
