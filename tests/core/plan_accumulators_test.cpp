// Where a plan keeps accumulators.
#include <boost/test/unit_test.hpp>

#include "core/plan_requests.hpp"
#include "stream_cqsa/plan.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

// Merging on the device changes where accumulators are, never how the problem is cut.
BOOST_AUTO_TEST_CASE(accumulators_on_the_device_where_its_budget_holds_them) {
  int on_device = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + 1000; ++seed) {
    Random random(seed);
    PlanRequest request = random_request(random);
    request.device.merges = false;
    const auto plain = try_plan(request);
    request.device.merges = true;
    const auto merging = try_plan(request);
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      BOOST_REQUIRE_EQUAL(plain.has_value(), merging.has_value());
      if (!plain) continue;
      BOOST_TEST((plain->placement != AccumulatorPlacement::device));
      BOOST_REQUIRE_EQUAL(merging->division.chunk_count(), plain->division.chunk_count());
      BOOST_REQUIRE_EQUAL(merging->groups.size(), plain->groups.size());
      if (merging->placement != AccumulatorPlacement::device) {
        BOOST_TEST((merging->device == plain->device));
        BOOST_TEST((merging->host == plain->host));
        continue;
      }
      ++on_device;
      BOOST_TEST((merging->order == ScheduleOrder::groups_outer));
      BOOST_TEST(merging->scratch_bytes == 0);
    }
  }
  BOOST_TEST(on_device > 100);
}

// 13 chunks of 64 tokens in quorums of 4, one head of 128: 17 state slots and 5 output slots.
BOOST_AUTO_TEST_CASE(the_device_budget_decides_where_accumulators_are) {
  PlanRequest request = large_request(13 * 64, 1);
  request.device.tile = 64;
  request.device.merges = true;
  request.device.workspace_bytes = 1000;
  request.chunks = 13;
  request.host_budget = 4 * MiB;
  request.lse = true;
  const std::int64_t query = 64 * 128 * 2;
  const std::int64_t state = 64 * 130 * 4;
  const std::int64_t output = 64 * (128 * 2 + 8);
  const std::int64_t needed = 8 * query + 8 * 2 * query + 17 * state + 5 * output + 1000;
  request.device_budget = needed;
  const Plan exact = make_plan(request);
  BOOST_TEST((exact.placement == AccumulatorPlacement::device));
  BOOST_TEST(exact.device.bytes() == needed);
  BOOST_TEST(exact.device.state_slots == 17);
  BOOST_TEST(exact.device.output_slots == 5);
  // The cache holds all of Q, K and V; a buffer, a chunk's rows.
  BOOST_TEST(exact.host.output_buffer_bytes == output);
  BOOST_TEST(exact.host.output_buffers == 13);
  BOOST_TEST(exact.host.bytes() == 13 * output + exact.host.cache_blocks * query);
  request.device_budget = needed - 1;
  BOOST_TEST((make_plan(request).placement == AccumulatorPlacement::memory));

  // With one chunk a state slot is enough: it is finished before the next launch.
  request.chunks = 1;
  request.problem.batch = 3;
  request.device_budget = 13 * (2 * 3 * query + state + 2 * output) + 1000;
  const Plan single = make_plan(request);
  BOOST_TEST((single.placement == AccumulatorPlacement::device));
  BOOST_TEST(single.device.state_slots == 1);
  BOOST_TEST(single.device.output_slots == 2);
  BOOST_TEST(single.device.bytes() == request.device_budget);
}
