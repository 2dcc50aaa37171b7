// Plans of tiles.
#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <limits>
#include <string>

#include "core/plan_requests.hpp"
#include "core/plan_sizes.hpp"
#include "stream_cqsa/error.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

PlanRequest tiles_request(std::int64_t length, std::int64_t heads) {
  PlanRequest request = large_request(length, heads);
  request.scheme = Scheme::tiles;
  request.device.merges = true;
  return request;
}

double bytes_into_the_device(const Plan& plan) { return estimate_traffic(plan).copied_in; }

// By the division itself, of keys that are loaded for every row anew.
double key_bytes_by_count(const Plan& plan) {
  const Division& division = plan.division;
  std::int64_t tokens = 0;
  for (std::int64_t row = 0; row < division.grid().rows; ++row) {
    const Range columns = division.live_columns(row);
    for (std::int64_t column = columns.begin; column < columns.end; ++column)
      tokens += division.chunk(column).keys.size();
  }
  const Problem& problem = plan.problem();
  return static_cast<double>(2 * tokens * problem.kv_heads * problem.head_dim *
                             size_of(problem.dtype) * problem.batch);
}

}  // namespace

BOOST_AUTO_TEST_CASE(tiles_are_copied_in_beside_the_computing_whatever_the_budget) {
  for (const std::int64_t heads : {1, 8}) {
    for (const std::int64_t budget : {48 * MiB, 256 * MiB, GiB, 4 * GiB}) {
      PlanRequest request = tiles_request(1 << 20, heads);
      request.device_budget = budget;
      const Plan plan = make_plan(request);
      BOOST_TEST_CONTEXT(text_of(request) << describe(plan)) {
        BOOST_TEST((plan.order == ScheduleOrder::groups_outer));
        BOOST_TEST((plan.placement == AccumulatorPlacement::device));
        BOOST_TEST(plan.device.bytes() <= budget);
        BOOST_TEST(plan.device.state_slots <= 2);
        BOOST_TEST(plan.device.query_slots <= 2);
        BOOST_TEST(plan.device.kv_slots >=
                   std::min<std::int64_t>(2, heads * plan.division.grid().columns));
        BOOST_TEST(plan.division.quorum_count() <= 65536);
      }
    }
  }
}

// No grid of a wide choice moves much less.
BOOST_AUTO_TEST_CASE(the_grid_chosen_moves_few_bytes) {
  for (const std::int64_t budget : {24 * MiB, 100 * MiB, 300 * MiB, GiB}) {
    PlanRequest request = tiles_request(1 << 19, 1);
    request.device_budget = budget;
    const double chosen = bytes_into_the_device(make_plan(request));
    double least = std::numeric_limits<double>::infinity();
    for (std::int64_t rows = 1; rows <= 80; ++rows) {
      for (std::int64_t columns = 1; columns <= 128; columns *= 2) {
        request.grid = Grid{rows, columns};
        const auto plan = try_plan(request);
        const bool comparable = plan && plan->placement == AccumulatorPlacement::device;
        if (comparable) least = std::min(least, bytes_into_the_device(*plan));
      }
    }
    BOOST_TEST(chosen <= 1.3 * least, "budget " << budget << ": " << chosen << ", " << least);
  }
}

BOOST_AUTO_TEST_CASE(the_estimated_bytes_of_keys_are_those_of_the_tiles) {
  for (const Mask mask : {Mask::none, Mask::causal}) {
    for (const Grid& grid : {Grid{8, 32}, {32, 8}, {64, 64}, {5, 200}}) {
      PlanRequest request = tiles_request(1 << 18, 2);
      request.problem.mask = mask;
      request.grid = grid;
      request.heads_per_group = 1;
      // Not enough to keep any keys.
      const Plan smallest = [&] {
        request.device_budget = smallest_device_budget(request);
        return make_plan(request);
      }();
      const double queries = static_cast<double>(std::int64_t{1} << 18) * 2 * 128 * 2;
      const double estimated = bytes_into_the_device(smallest) - queries;
      const double counted = key_bytes_by_count(smallest);
      BOOST_TEST(estimated == counted, boost::test_tools::tolerance(0.15));
    }
  }
}

BOOST_AUTO_TEST_CASE(the_device_budget_decides_where_accumulators_of_tiles_are) {
  PlanRequest request = tiles_request(16 * 64, 1);
  request.device.tile = 64;
  request.device.workspace_bytes = 1000;
  request.grid = Grid{8, 16};
  request.lse = true;
  const std::int64_t query = 128 * 128 * 2, key = 64 * 128 * 2;
  const std::int64_t state = 128 * 130 * 4, output = 128 * (128 * 2 + 8);
  const std::int64_t needed = 2 * query + 2 * 2 * key + 2 * state + 2 * output + 1000;
  request.device_budget = needed;
  const Plan exact = make_plan(request);
  BOOST_TEST((exact.placement == AccumulatorPlacement::device));
  BOOST_TEST(exact.device.bytes() == needed);
  BOOST_TEST(exact.device.state_slots == 2);
  request.device_budget = needed - 1;
  BOOST_TEST((make_plan(request).placement == AccumulatorPlacement::memory));
  // More than that keeps keys.
  request.device_budget = needed + 5 * 2 * key;
  BOOST_TEST(make_plan(request).device.kv_slots == 7);
  BOOST_TEST(make_plan(request).device.query_slots == 2);
  // Rows of one tile are finished where they lie.
  request.grid = Grid{8, 1};
  request.device_budget = GiB;
  BOOST_TEST(make_plan(request).device.state_slots == 1);
}

BOOST_AUTO_TEST_CASE(accumulators_of_tiles_are_those_of_two_rows) {
  PlanRequest request = tiles_request(1 << 20, 4);
  request.host_accumulators = true;
  request.heads_per_group = 1;
  request.grid = Grid{32, 16};
  const Plan plan = make_plan(request);
  const std::int64_t rows = (1 << 20) / 32;
  BOOST_TEST((plan.placement == AccumulatorPlacement::memory));
  BOOST_TEST(plan.host.accumulators == 2 * ceil_div(rows, plan.piece_tokens));
}

BOOST_AUTO_TEST_CASE(requests_of_the_other_scheme_are_refused) {
  const auto refused = [](const auto& change, const std::string& word) {
    PlanRequest request = large_request(4096, 2);
    change(request);
    BOOST_CHECK_EXCEPTION(make_plan(request), InputError, [&](const InputError& error) {
      return std::string(error.what()).find(word) != std::string::npos;
    });
  };
  using R = PlanRequest;
  refused([](R& r) { r.grid = Grid{2, 2}; }, "tiles");
  refused([](R& r) { r.scheme = Scheme::tiles, r.chunks = 7; }, "grid");
  for (const std::int64_t bad :
       {std::int64_t{0}, std::int64_t{-3}, std::int64_t{20001}, INT64_MAX}) {
    refused([bad](R& r) { r.scheme = Scheme::tiles, r.grid = Grid{bad, 2}; }, "20000");
    refused([bad](R& r) { r.scheme = Scheme::tiles, r.grid = Grid{2, bad}; }, "20000");
  }
}

BOOST_AUTO_TEST_CASE(tiles_are_printed_and_drawn) {
  for (const Grid& grid : {Grid{1, 1}, {2, 7}, {7, 2}, {200, 3}, {3, 201}, {5000, 2}, {300, 300}}) {
    PlanRequest request = tiles_request(1 << 18, 1);
    request.grid = grid;
    const Plan plan = make_plan(request);
    std::stringstream out;
    write_svg(plan, out);
    const std::string svg = out.str();
    BOOST_TEST(svg.find("<svg") == 0u);
    BOOST_TEST(svg.size() < 4000000u);
    BOOST_TEST(svg.substr(svg.size() - 7) == "</svg>\n");
    BOOST_TEST(svg.find("nan") == std::string::npos);
    BOOST_TEST(svg.find("tiles") != std::string::npos);
    BOOST_TEST(describe(plan).find("tiles, ") != std::string::npos);
    const std::string json = json_of(plan);
    BOOST_TEST(json.find("\"division\": \"tiles\"") != std::string::npos);
    BOOST_TEST(json.find(fmt::format("\"grid\": [{},{}]", grid.rows, grid.columns)) !=
               std::string::npos);
    BOOST_TEST(json.find("cover") == std::string::npos);
  }
}

BOOST_AUTO_TEST_CASE(a_plan_of_tiles_that_disagrees_is_refused) {
  PlanRequest request = tiles_request(4096, 4);
  request.grid = Grid{3, 5};
  const std::string good = json_of(make_plan(request));
  const auto message_with = [&](const std::string& from, const std::string& to) -> std::string {
    std::string text = good;
    const auto at = text.find(from);
    BOOST_REQUIRE(at != std::string::npos);
    std::stringstream in(text.replace(at, from.size(), to));
    try {
      read_plan(in, "my.json");
    } catch (const InputError& error) {
      return error.what();
    }
    return "nothing thrown";
  };
  const auto says = [](const std::string& message, const std::string& part) {
    BOOST_TEST(message.find(part) != std::string::npos, message << " has no " << part);
  };
  says(message_with("\"division\": \"tiles\"", "\"division\": \"tile\""), "not known");
  says(message_with("\"division\": \"tiles\"", "\"division\": \"cqs\""), "my.json");
  says(message_with("\"grid\": [3,5]", "\"grid\": [5,3]"), "'grid'");
  says(message_with("\"grid\":[3,5]", "\"grid\":[3]"), "two integers");
  says(message_with("\"grid\":[3,5]", "\"grid\":[3,0]"), "20000");
  says(message_with("\"grid\":[3,5]", "\"grid\":\"3x5\""), "two integers");
  BOOST_TEST(message_with("\"grid\"", "\"grid\"") == "nothing thrown");
}
