// A plan's arenas on the ranks that share it.
#define BOOST_TEST_MODULE plan_roles
#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <optional>
#include <random>

#include "stream_cqsa/error.hpp"
#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/softmax_state.hpp"

using namespace stream_cqsa;

namespace {

PlanRequest random_request(std::mt19937_64& random) {
  PlanRequest request;
  Problem& problem = request.problem;
  problem.batch = 1 + static_cast<std::int64_t>(random() % 2);
  problem.kv_heads = 1 + static_cast<std::int64_t>(random() % 3);
  problem.query_heads = problem.kv_heads * (1 + static_cast<std::int64_t>(random() % 2));
  problem.query_length = 1 + static_cast<std::int64_t>(random() % 5000);
  problem.key_length = problem.query_length;
  problem.head_dim = 64;
  problem.mask = random() % 2 ? Mask::causal : Mask::none;
  problem.scale = default_scale(64);
  request.device.tile = 128;
  request.lse = random() % 2 == 0;
  request.workers = 1 + static_cast<std::int64_t>(random() % 5);
  request.host_accumulators = true;
  request.device_budget = std::int64_t{1} << (24 + random() % 4);
  request.host_budget = std::int64_t{1} << (24 + random() % 6);
  request.chunks = std::array<std::int64_t, 4>{1, 3, 7, 13}[random() % 4];
  if (random() % 3 == 0) {
    request.scheme = Scheme::tiles;
    request.chunks.reset();
    if (random() % 2)
      request.grid = Grid{1 + static_cast<std::int64_t>(random() % 9),
                          1 + static_cast<std::int64_t>(random() % 9)};
  }
  return request;
}

// None where the budgets are too small.
std::optional<Plan> try_plan(const PlanRequest& request) {
  try {
    return make_plan(request);
  } catch (const InputError&) {
    return std::nullopt;
  }
}

// With accumulators on the workers' devices, which take whole head groups.
Plan random_plan_by_groups(std::mt19937_64& random) {
  for (;;) {
    PlanRequest request = random_request(random);
    request.device.merges = true;
    request.host_accumulators = false;
    request.heads_per_group = 1;
    const auto plan = try_plan(request);
    if (plan && plan->placement == AccumulatorPlacement::device) return *plan;
  }
}

std::int64_t longest_chunk(const Plan& plan) {
  std::int64_t longest = 0;
  for (std::int64_t i = 0; i < plan.division.chunk_count(); ++i)
    longest = std::max(longest, plan.division.chunk(i).queries.size());
  return longest;
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_worker_has_room_for_every_chunk_within_its_own_budgets) {
  std::mt19937_64 random(3);
  int fitted = 0;
  for (int trial = 0; trial < 400; ++trial) {
    try {
      const Plan plan = make_plan(random_request(random));
      DeviceTraits device = plan.request.device;
      device.tile = std::array<std::int64_t, 3>{32, 64, 128}[random() % 3];
      const std::int64_t device_budget = plan.request.device_budget * 3 / (2 + random() % 3);
      const std::int64_t host_budget = plan.request.host_budget * 3 / (2 + random() % 3);
      const Plan own = worker_plan(plan, device, device_budget, host_budget);
      ++fitted;
      BOOST_TEST(own.device.bytes() <= device_budget);
      BOOST_TEST(own.host.bytes() <= host_budget);
      BOOST_TEST(own.host.state_buffers >= 2);
      BOOST_TEST(own.piece_tokens == plan.piece_tokens);
      const std::int64_t heads = plan.groups.front().query_heads(plan.problem()).size();
      const std::int64_t rows = longest_chunk(plan) * heads;
      BOOST_TEST(own.device.query_slot_bytes >= rows * 64 * 4);
      BOOST_TEST(own.device.state_slot_bytes >= softmax_state_bytes(rows, 64));
    } catch (const InputError&) {
      // Too small: said so.
    }
  }
  BOOST_TEST(fitted > 200);
}

BOOST_AUTO_TEST_CASE(ranks_that_merge_have_accumulators_for_their_chunks_within_their_own_budgets) {
  std::mt19937_64 random(5);
  int fitted = 0, smaller = 0;
  for (int trial = 0; trial < 400; ++trial) {
    PlanRequest request = random_request(random);
    request.mergers = static_cast<std::int64_t>(random() % 4);
    request.scratch = random() % 4 == 0;
    try {
      const Plan plan = make_plan(request);
      const std::int64_t c = plan.division.chunk_count();
      const auto begin = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(c));
      const Range chunks{begin, std::min(c, begin + c / (request.mergers + 1))};
      const std::int64_t budget = plan.request.host_budget * 3 / (2 + random() % 4);
      const Plan own = merger_plan(plan, request.workers, chunks, budget);
      ++fitted;
      BOOST_TEST(own.host.bytes() <= budget);
      BOOST_TEST(own.device.bytes() == 0);
      BOOST_TEST((own.merged_chunks == chunks));
      BOOST_TEST(own.host.state_buffers >= 2);
      BOOST_TEST(own.host.output_buffers >= 1);
      BOOST_TEST(own.piece_tokens == plan.piece_tokens);
      // All that are open at once: of tiles a row.
      const bool tiles = plan.division.scheme() == Scheme::tiles;
      std::int64_t pieces = 0;
      for (std::int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
        const std::int64_t more =
            ceil_div(plan.division.chunk(chunk).queries.size(), plan.piece_tokens);
        pieces = tiles ? std::max(pieces, more) : pieces + more;
      }
      if (own.placement == AccumulatorPlacement::memory && plan.division.most_partials() > 1)
        BOOST_TEST(own.host.accumulators >= pieces);
      BOOST_TEST((own.placement == AccumulatorPlacement::memory || request.scratch));
      smaller += own.host.accumulators < master_plan(plan, request.workers).host.accumulators;
    } catch (const InputError&) {
      // Too small: said so.
    }
  }
  BOOST_TEST(fitted > 200);
  BOOST_TEST(smaller > 20);
}

BOOST_AUTO_TEST_CASE(mergers_make_room_for_problems_that_one_rank_has_none_for) {
  PlanRequest request;
  request.problem.query_heads = request.problem.kv_heads = 1;
  request.problem.query_length = request.problem.key_length = 1 << 20;
  request.problem.head_dim = 64;
  request.problem.scale = default_scale(64);
  request.host_accumulators = true;
  request.workers = 4;
  request.device_budget = std::int64_t{1} << 30;
  request.host_budget = std::int64_t{160} << 20;  // of 264 MiB of accumulators
  request.chunks = 133;
  BOOST_CHECK_THROW(make_plan(request), InputError);
  request.mergers = 3;
  const Plan plan = make_plan(request);
  BOOST_TEST(plan.host.bytes() <= request.host_budget);
  BOOST_TEST(plan.request.mergers == 3);
  BOOST_CHECK_THROW(master_plan(plan, 4), InputError);
  const Plan own = merger_plan(plan, 4, {33, 66}, request.host_budget);
  BOOST_TEST(own.host.bytes() <= request.host_budget);
  BOOST_TEST((own.placement == AccumulatorPlacement::memory));
}

BOOST_AUTO_TEST_CASE(a_master_stays_within_the_host_budget_and_needs_no_device) {
  std::mt19937_64 random(4);
  for (int trial = 0; trial < 200; ++trial) {
    const PlanRequest request = random_request(random);
    try {
      const Plan plan = make_plan(request);
      const Plan own = master_plan(plan, request.workers);
      BOOST_TEST(own.host.bytes() <= request.host_budget);
      BOOST_TEST(own.device.bytes() == 0);
      BOOST_TEST(own.host.accumulators >= plan.host.accumulators);
      BOOST_TEST(own.host.output_buffers >= plan.host.output_buffers);
      BOOST_TEST(own.host.state_buffers >= plan.host.state_buffers);
      BOOST_TEST(own.host.cache_blocks == 0);
      const Plan serving = master_plan(plan, request.workers, true);
      BOOST_TEST(serving.host.bytes() <= request.host_budget);
      BOOST_TEST(serving.host.accumulators >= plan.host.accumulators);
      BOOST_TEST(serving.host.state_buffers >= plan.host.state_buffers);
      BOOST_TEST(serving.host.cache_blocks >= 1);
      BOOST_TEST(serving.host.cache_block_bytes == plan.host.cache_block_bytes);
    } catch (const InputError&) {
      // Too small: said so.
    }
  }
}

BOOST_AUTO_TEST_CASE(a_worker_that_takes_head_groups_has_accumulators_and_sends_finished_rows) {
  std::mt19937_64 random(6);
  int fitted = 0, refused = 0;
  for (int trial = 0; trial < 200; ++trial) {
    const Plan plan = random_plan_by_groups(random);
    const std::int64_t device_budget =
        plan.device.bytes() * static_cast<std::int64_t>(2 + random() % 10) / 8;
    const std::int64_t host_budget = plan.request.host_budget * 3 / (2 + random() % 3);
    try {
      const Plan own = worker_plan(plan, plan.request.device, device_budget, host_budget);
      ++fitted;
      BOOST_TEST((own.placement == AccumulatorPlacement::device));
      BOOST_TEST(own.device.bytes() <= device_budget);
      BOOST_TEST(own.host.bytes() <= host_budget);
      BOOST_TEST(own.host.output_buffers >= 3);
      BOOST_TEST(own.host.state_buffers == 0);
      BOOST_TEST(own.host.accumulators == 0);
      BOOST_TEST(own.scratch_bytes == 0);
      BOOST_TEST(own.piece_tokens == plan.piece_tokens);
      const std::int64_t c = plan.division.chunk_count();
      std::int64_t chunks = 0;  // with queries
      for (std::int64_t i = 0; i < c; ++i) chunks += !plan.division.chunk(i).queries.empty();
      // Tiles are merged row by row: the accumulator of one row, and a partial.
      const bool tiles = plan.division.scheme() == Scheme::tiles;
      const bool merged = plan.division.most_partials() > 1;
      BOOST_TEST(own.device.state_slots >= (!merged ? 1 : tiles ? 2 : chunks + 1));
      BOOST_TEST(own.device.output_slots >= 1);
      const std::int64_t rows =
          longest_chunk(plan) * plan.groups.front().query_heads(plan.problem()).size();
      BOOST_TEST(own.device.state_slot_bytes >= softmax_state_bytes(rows, 64));
      BOOST_TEST(own.device.output_slot_bytes >= rows * 64 * size_of(plan.problem().output_dtype));
    } catch (const InputError& error) {
      ++refused;
      const std::string message = error.what();
      BOOST_TEST((message.find("host memory") != std::string::npos ||
                  message.find("accumulators of a whole head group") != std::string::npos));
    }
  }
  BOOST_TEST(fitted > 50);
  BOOST_TEST(refused > 20);
}

BOOST_AUTO_TEST_CASE(ranks_that_get_finished_rows_have_buffers_for_them_alone) {
  std::mt19937_64 random(7);
  int fitted = 0;
  for (int trial = 0; trial < 200; ++trial) {
    const Plan plan = random_plan_by_groups(random);
    const std::int64_t c = plan.division.chunk_count();
    const auto begin = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(c));
    for (const Range& chunks : {Range{0, c}, Range{begin, c}}) {
      const std::int64_t budget = plan.request.host_budget * 3 / (2 + random() % 4);
      try {
        const Plan own = merger_plan(plan, plan.request.workers, chunks, budget, trial % 2 == 0);
        ++fitted;
        BOOST_TEST((own.placement == AccumulatorPlacement::device));
        BOOST_TEST((own.merged_chunks == chunks));
        BOOST_TEST(own.device.bytes() == 0);
        BOOST_TEST(own.host.bytes() <= budget);
        BOOST_TEST(own.host.output_buffers >= 2);
        BOOST_TEST(own.host.state_buffers == 0);
        BOOST_TEST(own.host.accumulators == 0);
        BOOST_TEST(own.scratch_bytes == 0);
        BOOST_TEST((own.host.cache_blocks > 0) == (trial % 2 == 0));
      } catch (const InputError& error) {
        BOOST_TEST(std::string(error.what()).find("host memory") != std::string::npos);
      }
    }
  }
  BOOST_TEST(fitted > 200);
}

BOOST_AUTO_TEST_CASE(a_rehearsal_has_the_division_and_no_accumulators_within_the_budgets) {
  std::mt19937_64 random(9);
  int on_device = 0, shorter = 0, refused = 0;
  for (int trial = 0; trial < 500; ++trial) {
    PlanRequest request = random_request(random);
    request.device.merges = trial % 2 == 0;
    request.host_accumulators = trial % 2 == 1;
    request.scratch = trial % 3 == 0;
    request.workers = 1;
    if (trial % 4 == 0) request.host_budget >>= random() % 6;
    const auto made = try_plan(request);
    if (!made) continue;
    const Plan& plan = *made;
    const bool was_on_device = plan.placement == AccumulatorPlacement::device;
    try {
      const Plan own = rehearsal_plan(plan);
      on_device += was_on_device;
      shorter += own.piece_tokens < plan.piece_tokens;
      BOOST_TEST((own.placement == AccumulatorPlacement::memory));
      BOOST_TEST(own.device.bytes() <= request.device_budget);
      BOOST_TEST(own.host.bytes() <= request.host_budget);
      BOOST_TEST(own.host.accumulators == 0);
      BOOST_TEST(own.host.output_buffers == 0);
      BOOST_TEST(own.scratch_bytes == 0);
      BOOST_TEST(own.host.state_buffers >= 2);
      BOOST_TEST(own.host.cache_blocks >= std::min<std::int64_t>(3, plan.host.cache_blocks));
      BOOST_TEST(own.host.cache_blocks <= plan.host.cache_blocks);
      BOOST_TEST(own.subproblem_count() == plan.subproblem_count());
      BOOST_TEST((own.groups == plan.groups));
      if (!was_on_device) BOOST_TEST((own.device == plan.device));
      const std::int64_t heads = plan.groups.front().query_heads(plan.problem()).size();
      BOOST_TEST(own.host.state_buffer_bytes >= softmax_state_bytes(own.piece_tokens * heads, 64));
    } catch (const InputError&) {
      BOOST_TEST(was_on_device);
      ++refused;
    }
  }
  BOOST_TEST(on_device > 50);
  BOOST_TEST_MESSAGE(shorter << " with shorter pieces, " << refused << " refused");
}

BOOST_AUTO_TEST_CASE(a_plan_within_less_device_memory_has_the_same_division) {
  std::mt19937_64 random(8);
  int on_device = 0, on_host = 0, refused = 0;
  for (int trial = 0; trial < 300; ++trial) {
    PlanRequest request = random_request(random);
    request.device.merges = trial % 3 > 0;
    request.host_accumulators = trial % 3 == 0;
    request.workers = 1;
    const auto made = try_plan(request);
    if (!made) continue;
    const Plan& plan = *made;
    const std::int64_t budget = plan.device.bytes() * static_cast<std::int64_t>(random() % 12) / 11;
    try {
      const Plan own = within_device(plan, budget);
      BOOST_TEST(own.device.bytes() <= budget);
      BOOST_TEST(own.host.bytes() <= request.host_budget);
      BOOST_TEST(own.division.chunk_count() == plan.division.chunk_count());
      BOOST_TEST((own.merged_chunks == plan.merged_chunks));
      BOOST_TEST(own.device.query_slots >= 1);
      const bool moved = own.placement != plan.placement;
      if (moved) {
        BOOST_TEST((plan.placement == AccumulatorPlacement::device));
        BOOST_TEST(own.device.output_slots == 0);
      } else {
        BOOST_TEST((own.groups == plan.groups));
        BOOST_TEST((own.host == plan.host));
        BOOST_TEST(own.device.query_slot_bytes == plan.device.query_slot_bytes);
      }
      (moved ? on_host : on_device) += plan.placement == AccumulatorPlacement::device;
    } catch (const InputError&) {
      ++refused;
    }
  }
  BOOST_TEST(on_device > 10);
  BOOST_TEST(on_host > 10);
  BOOST_TEST(refused > 10);
}
