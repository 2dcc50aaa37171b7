#define BOOST_TEST_MODULE plan
#include "stream_cqsa/plan.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <boost/test/unit_test.hpp>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "core/plan_requests.hpp"
#include "core/plan_sizes.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/softmax_state.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

void check_device_arena(const Plan& plan) {
  const Problem& problem = plan.problem();
  const std::int64_t element = size_of(storage_type(problem.dtype));
  std::int64_t heads = 0;
  for (const HeadGroup& group : plan.groups) heads = std::max(heads, group.count);
  const std::int64_t query_heads = heads * problem.query_heads_per_kv_head();
  std::int64_t queries = 0;
  std::int64_t keys = 0;
  for (std::int64_t i = 0; i < plan.division.chunk_count(); ++i) {
    queries = std::max(queries, plan.division.chunk(i).queries.size());
    keys = std::max(keys, plan.division.chunk(i).keys.size());
  }
  const std::int64_t alignment = plan.request.device.slot_alignment;
  const std::int64_t dim = problem.head_dim;
  BOOST_TEST(plan.device.query_slot_bytes ==
             round_up(queries * query_heads * dim * element, alignment));
  BOOST_TEST(plan.device.kv_slot_bytes == 2 * round_up(keys * heads * dim * element, alignment));
  BOOST_TEST(plan.device.state_slot_bytes ==
             round_up(softmax_state_bytes(queries * query_heads, dim), alignment));
  BOOST_TEST(plan.device.bytes() <= plan.request.device_budget);
  BOOST_TEST(plan.piece_tokens <= queries);
  const std::int64_t output = dim * size_of(problem.output_dtype);
  const std::int64_t piece_rows = plan.piece_tokens * query_heads;
  if (plan.placement == AccumulatorPlacement::device) {
    const auto finished = [&](std::int64_t rows) {
      return round_up(rows * output, 64) + (plan.request.lse ? 8 * rows : 0);
    };
    BOOST_TEST(plan.device.output_slots >= 1);
    BOOST_TEST(plan.device.output_slot_bytes ==
               round_up(finished(queries * query_heads), alignment));
    BOOST_TEST(plan.host.output_buffer_bytes == round_up(finished(piece_rows), 64));
  } else {
    BOOST_TEST(plan.device.output_slots == 0);
    BOOST_TEST(plan.device.output_slot_bytes == 0);
    BOOST_TEST(plan.host.state_buffer_bytes >= softmax_state_bytes(piece_rows, dim));
    BOOST_TEST(plan.host.output_buffer_bytes >= piece_rows * (output + (plan.request.lse ? 4 : 0)));
  }
  const DeviceArena& arena = plan.device;
  BOOST_TEST(arena.bytes() ==
             arena.query_slots * arena.query_slot_bytes + arena.kv_slots * arena.kv_slot_bytes +
                 arena.state_slots * arena.state_slot_bytes +
                 arena.output_slots * arena.output_slot_bytes + arena.workspace_bytes);
}

void check_host_arena(const Plan& plan) {
  const PlanRequest& request = plan.request;
  const HostArena& host = plan.host;
  BOOST_TEST(host.bytes() <= request.host_budget);
  const bool on_device = plan.placement == AccumulatorPlacement::device;
  BOOST_TEST(on_device == (host.state_buffers == 0));
  BOOST_TEST(on_device == (host.accumulators == 0));
  if (!on_device) BOOST_TEST(host.state_buffers >= 2);
  BOOST_TEST(host.output_buffers >= 1);
  BOOST_TEST(host.accumulator_bytes == host.state_buffer_bytes);
  BOOST_TEST(plan.piece_tokens >= 1);
  BOOST_TEST(plan.query_block_tokens >= 1);
  BOOST_TEST(plan.key_block_tokens >= 1);
  const bool resident = request.query.resident && request.key.resident && request.value.resident;
  BOOST_TEST(resident == (host.cache_blocks == 0));
  const Problem& problem = plan.problem();
  const std::int64_t vector = problem.head_dim * size_of(storage_type(problem.dtype));
  if (!request.query.resident && request.query.layout == Layout::bshd) {
    BOOST_TEST(host.cache_block_bytes >= plan.query_block_tokens * problem.query_heads * vector);
  }
  if (!request.value.resident && request.value.layout == Layout::bshd) {
    BOOST_TEST(host.cache_block_bytes >= plan.key_block_tokens * problem.kv_heads * vector);
  }
  if (plan.placement == AccumulatorPlacement::file) {
    BOOST_TEST(request.scratch);
    BOOST_TEST(plan.scratch_bytes > 0);
  } else {
    BOOST_TEST(plan.scratch_bytes == 0);
  }
}

// With accumulators on the device: those of one batch entry and head group that are open.
class OpenAccumulators {
 public:
  explicit OpenAccumulators(const Plan& plan) : plan_(plan) {}
  // State slots needed at once: the open accumulators and this subproblem's partials.
  std::size_t add(std::int64_t id, const std::set<std::int32_t>& queries, const QuorumWork& work) {
    const std::size_t needed = left_.size() + queries.size();
    const SubproblemKey key = plan_.key(id);
    for (const std::int32_t position : queries) {
      const std::int64_t chunk = work.chunks[static_cast<std::size_t>(position)].index;
      const auto partials = plan_.division.quorums_of_query(chunk).size();
      const auto [at, first] = left_.try_emplace({key.batch, key.group, chunk}, partials);
      if (--at->second == 0) left_.erase(at);
    }
    return needed;
  }

 private:
  const Plan& plan_;
  std::map<std::array<std::int64_t, 3>, std::size_t> left_;  ///< partials to come
};

// Room for the items of a subproblem's work list.
void check_workspace(const Plan& plan, std::size_t queries, std::size_t pairs) {
  const DeviceTraits& device = plan.request.device;
  const auto needed = device.workspace_bytes +
                      static_cast<std::int64_t>(queries) * device.query_item_bytes +
                      static_cast<std::int64_t>(pairs) * device.key_item_bytes;
  BOOST_REQUIRE_LE(needed, plan.device.workspace_bytes);
}

// Whether a quorum's query chunks are computed one or a few at a time: where the device has no room
// for all of them.
bool is_in_parts(const Plan& plan) {
  const Cut cut = cut_of(plan);
  const bool parts = minimum_device_arena(plan.request, cut).bytes() > plan.request.device_budget;
  if (parts) {
    BOOST_TEST(plan.device.query_slots >= 1);
    BOOST_TEST(plan.device.state_slots >= 1);
    BOOST_TEST(describe(plan).find("in parts of up to") != std::string::npos);
  }
  return parts;
}

// Every live pair of every batch entry and group exactly once, in slots that there are.
void check_subproblems(const Plan& plan) {
  const std::int64_t c = plan.division.chunk_count();
  const auto groups = static_cast<std::int64_t>(plan.groups.size());
  std::vector<int> count(plan.problem().batch * groups * c * c, 0);
  OpenAccumulators open(plan);
  const bool on_device = plan.placement == AccumulatorPlacement::device;
  for (std::int64_t id = 0; id < plan.subproblem_count(); ++id) {
    const SubproblemKey key = plan.key(id);
    BOOST_REQUIRE_EQUAL(plan.id(key), id);
    BOOST_REQUIRE(key.batch >= 0 && key.batch < plan.problem().batch);
    BOOST_REQUIRE(key.group >= 0 && key.group < groups);
    BOOST_REQUIRE(key.quorum >= 0 && key.quorum < plan.division.quorum_count());
    const QuorumWork work = plan.work(id);
    std::set<std::int32_t> queries;
    std::set<std::int32_t> keys;
    for (const ChunkPair& pair : work.pairs) {
      queries.insert(pair.query);
      keys.insert(pair.key);
      const std::int64_t p = work.chunks[pair.query].index;
      const std::int64_t q = work.chunks[pair.key].index;
      ++count[((key.batch * groups + key.group) * c + p) * c + q];
    }
    BOOST_REQUIRE_LE(static_cast<std::int64_t>(keys.size()), plan.device.kv_slots);
    if (!is_in_parts(plan)) {
      BOOST_REQUIRE_LE(static_cast<std::int64_t>(queries.size()), plan.device.query_slots);
      BOOST_REQUIRE_LE(static_cast<std::int64_t>(queries.size()), plan.device.state_slots);
    }
    BOOST_REQUIRE_LE(plan.device_bytes(work), plan.device.bytes());
    check_workspace(plan, queries.size(), work.pairs.size());
    if (on_device) {
      BOOST_REQUIRE_LE(static_cast<std::int64_t>(open.add(id, queries, work)),
                       plan.device.state_slots);
    }
  }
  for (std::size_t i = 0; i < count.size(); ++i) {
    const auto pair = static_cast<std::int64_t>(i) % (c * c);
    const bool live = plan.problem().liveness(plan.division.chunk(pair / c).queries,
                                              plan.division.chunk(pair % c).keys) != Liveness::dead;
    if (count[i] != (live ? 1 : 0)) {
      BOOST_FAIL(fmt::format("pair ({}, {}) is computed {} times", pair / c, pair % c, count[i]));
    }
  }
}

void check_groups(const Plan& plan) {
  std::int64_t next = 0;
  std::int64_t least = plan.groups.front().count;
  std::int64_t most = least;
  for (const HeadGroup& group : plan.groups) {
    BOOST_TEST(group.first == next);
    next += group.count;
    least = std::min(least, group.count);
    most = std::max(most, group.count);
  }
  BOOST_TEST(next == plan.problem().kv_heads);
  BOOST_TEST(most - least <= 1);
  if (plan.request.heads_per_group) BOOST_TEST(most <= *plan.request.heads_per_group);
}

}  // namespace

BOOST_AUTO_TEST_CASE(random_requests_give_sound_plans) {
  int planned = 0, in_parts = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + 3000; ++seed) {
    Random random(seed);
    PlanRequest request = random_shared_request(random);
    if (seed % 3 == 0) request = as_tiles(request, random);
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      const auto plan = try_plan(request);
      if (!plan) continue;
      ++planned;
      in_parts += is_in_parts(*plan);
      check_device_arena(*plan);
      check_host_arena(*plan);
      check_groups(*plan);
      if (request.chunks) BOOST_TEST(plan->division.chunk_count() == *request.chunks);
      if (request.grid) BOOST_TEST((plan->division.grid() == *request.grid));
      const std::int64_t work = plan->subproblem_count() * plan->division.chunk_count();
      if (work <= 4000) check_subproblems(*plan);
    }
  }
  BOOST_TEST(planned > 1000);
  BOOST_TEST(in_parts > 20);
}

BOOST_AUTO_TEST_CASE(ids_number_the_schedule) {
  for (std::uint64_t seed = first_seed; seed < first_seed + 300; ++seed) {
    Random random(seed);
    PlanRequest request = random_request(random);
    if (seed % 3 == 0) request = as_tiles(request, random);
    auto plan = try_plan(request);
    if (!plan || plan->subproblem_count() > 20000) continue;
    for (const auto order : {ScheduleOrder::groups_outer, ScheduleOrder::groups_inner}) {
      plan->order = order;
      std::int64_t id = 0;
      const std::int64_t c = plan->division.quorum_count();
      const auto groups = static_cast<std::int64_t>(plan->groups.size());
      const bool outer = order == ScheduleOrder::groups_outer;
      for (std::int64_t batch = 0; batch < plan->problem().batch; ++batch) {
        for (std::int64_t slow = 0; slow < (outer ? groups : c); ++slow) {
          for (std::int64_t fast = 0; fast < (outer ? c : groups); ++fast, ++id) {
            const SubproblemKey key =
                outer ? SubproblemKey{batch, slow, fast} : SubproblemKey{batch, fast, slow};
            BOOST_REQUIRE(plan->key(id) == key);
            BOOST_REQUIRE_EQUAL(plan->id(key), id);
          }
        }
      }
      BOOST_REQUIRE_EQUAL(id, plan->subproblem_count());
    }
  }
}

// A piece with a single partial is never accumulated.
BOOST_AUTO_TEST_CASE(one_chunk_needs_one_accumulator) {
  int planned = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + 500; ++seed) {
    Random random(seed);
    PlanRequest request = random_request(random);
    request.chunks = 1;
    request.device.merges = false;
    const auto plan = try_plan(request);
    if (!plan) continue;
    ++planned;
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      BOOST_TEST(plan->host.accumulators == 1);
      BOOST_TEST((plan->placement == AccumulatorPlacement::memory));
      BOOST_TEST(plan->scratch_bytes == 0);
      const Cut cut = cut_of(request, 1, static_cast<std::int64_t>(plan->groups.size()));
      const std::int64_t least = smallest_host_bytes(request, cut);
      request.scratch = !request.scratch;
      BOOST_TEST(smallest_host_bytes(request, cut) == least);
    }
  }
  BOOST_TEST(planned > 100);

  // The states of the whole output are many times this budget.
  PlanRequest request = large_request(1 << 20, 8);
  request.chunks = 1;
  request.host_budget = 256 * MiB;
  const Plan plan = make_plan(request);
  BOOST_TEST(plan.host.accumulators == 1);
  BOOST_TEST(plan.host.output_buffers == 8);  // of 1 MiB: a 32nd of the budget
  BOOST_TEST(plan.host.bytes() <= request.host_budget);
}

BOOST_AUTO_TEST_CASE(bad_requests_are_refused) {
  const PlanRequest good = large_request(4096, 4);
  const auto refused = [&](auto change) {
    PlanRequest request = good;
    change(request);
    BOOST_CHECK_THROW(make_plan(request), InputError);
  };
  refused([](PlanRequest& r) { r.problem.query_length = 0; });
  refused([](PlanRequest& r) { r.chunks = 0; });
  refused([](PlanRequest& r) { r.chunks = max_modulus + 1; });
  refused([](PlanRequest& r) { r.heads_per_group = 0; });
  refused([](PlanRequest& r) { r.heads_per_group = 5; });
  refused([](PlanRequest& r) { r.device.tile = 0; });
  refused([](PlanRequest& r) { r.device.slot_alignment = 0; });
  refused([](PlanRequest& r) { r.device.workspace_bytes = -1; });
  refused([](PlanRequest& r) { r.device_budget = 0; });
  refused([](PlanRequest& r) { r.device_budget = INT64_MIN; });
  refused([](PlanRequest& r) { r.host_budget = -1; });
}

BOOST_AUTO_TEST_CASE(one_subproblem_when_everything_fits) {
  const Plan plan = make_plan(large_request(4096, 4));
  BOOST_TEST(plan.subproblem_count() == 1);
  BOOST_TEST(plan.device.query_slots == 1);
  BOOST_TEST(plan.device.kv_slots == 1);
  BOOST_TEST(plan.device.state_slots == 1);
  BOOST_TEST((plan.placement == AccumulatorPlacement::memory));
  BOOST_TEST(plan.host.accumulators == 1);
}

BOOST_AUTO_TEST_CASE(heads_are_divided_before_the_sequence) {
  PlanRequest request = large_request(4096, 8);
  request.device_budget = make_plan(request).device.bytes() / 2;
  const Plan plan = make_plan(request);
  BOOST_TEST(plan.division.chunk_count() == 1);
  BOOST_TEST(plan.groups.size() > 1u);
  BOOST_TEST(plan.device.query_slots == 2);
}

BOOST_AUTO_TEST_CASE(full_tiles_while_there_are_enough) {
  PlanRequest request = large_request(128 * 57, 1);
  for (const std::int64_t c : {1, 7, 31, 57}) {
    request.chunks = c;
    BOOST_TEST(make_plan(request).division.tile() == 128);
  }
  request.chunks = 58;
  BOOST_TEST(make_plan(request).division.tile() == 64);
  request.chunks = 20000;
  BOOST_TEST(make_plan(request).division.tile() == 1);
}

BOOST_AUTO_TEST_CASE(head_groups_in_the_inner_loop_when_rows_hold_all_heads) {
  PlanRequest request = large_request(65536, 16);
  request.chunks = 57;
  request.device_budget = 24 * MiB;
  request.host_budget = 700 * MiB;
  const Plan rows = make_plan(request);
  BOOST_REQUIRE(rows.groups.size() > 1u);
  BOOST_TEST((rows.order == ScheduleOrder::groups_inner));
  request.query.layout = request.key.layout = request.value.layout = Layout::bhsd;
  BOOST_TEST((make_plan(request).order == ScheduleOrder::groups_outer));
  request.query.resident = request.key.resident = request.value.resident = true;
  BOOST_TEST((make_plan(request).order == ScheduleOrder::groups_outer));
  BOOST_TEST(make_plan(request).host.cache_blocks == 0);
}

BOOST_AUTO_TEST_CASE(very_long_sequences) {
  PlanRequest request = large_request(std::int64_t{1} << 30, 8);
  request.scratch = true;
  request.host_budget = 64 * GiB;
  const Plan plan = make_plan(request);
  BOOST_TEST(plan.device.bytes() <= request.device_budget);
  BOOST_TEST(plan.host.bytes() <= request.host_budget);
  BOOST_TEST((plan.placement == AccumulatorPlacement::file));
  BOOST_TEST(describe(plan).size() < 4000u);
  for (const std::int64_t c : {1000, 11557, 16257, 20000}) {
    for (const std::int64_t heads : {1, 3, 8}) {
      request.chunks = c;
      request.heads_per_group = heads;
      request.workers = 64 * (heads - 1) + 1;
      request.device_budget = (c == 1000 ? 64 : 16) * heads * GiB;
      const Plan divided = make_plan(request);
      BOOST_TEST(divided.device.bytes() <= request.device_budget);
      BOOST_TEST(divided.host.bytes() <= request.host_budget);
      BOOST_TEST(divided.division.chunk(c - 1).queries.end == request.problem.query_length);
      check_groups(divided);
      const QuorumWork work = divided.work(divided.subproblem_count() - 1);
      BOOST_TEST(!work.pairs.empty());
      BOOST_TEST(divided.device_bytes(work) <= divided.device.bytes());
      check_workspace(divided, work.chunks.size(), work.pairs.size());
      std::stringstream in(json_of(divided));
      BOOST_TEST((read_plan(in, "large").device == divided.device));
    }
  }
}
