// The choice of c and head groups.
#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "core/plan_requests.hpp"
#include "core/plan_sizes.hpp"
#include "stream_cqsa/difference_cover.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

// Whether one quorum can be copied in while another computes.
bool overlaps(const Plan& plan) {
  const Cut cut = cut_of(plan.request, plan.division.chunk_count(),
                         static_cast<std::int64_t>(plan.groups.size()));
  return preferred_device_arena(plan.request, cut).bytes() <= plan.request.device_budget;
}

bool fewer(const Cut& x, const Cut& y) {
  return std::pair(x.subproblems, x.c) < std::pair(y.subproblems, y.c);
}

// Every c with every number of head groups whose smallest arenas fit.
std::vector<Cut> cuts_that_fit(const PlanRequest& request) {
  const Problem& problem = request.problem;
  const std::int64_t last =
      std::min(max_modulus, std::max(problem.query_length, problem.key_length));
  std::vector<Cut> cuts;
  for (std::int64_t groups = 1; groups <= problem.kv_heads; ++groups) {
    const std::int64_t group_heads = ceil_div(problem.kv_heads, groups);
    if (request.heads_per_group && groups != ceil_div(problem.kv_heads, *request.heads_per_group)) {
      continue;
    }
    // The same largest group is had with fewer groups.
    if (groups > 1 && group_heads == ceil_div(problem.kv_heads, groups - 1)) continue;
    for (std::int64_t c = request.chunks.value_or(1); c <= request.chunks.value_or(last); ++c) {
      const Cut cut = cut_of(request, c, groups);
      const bool fits = minimum_device_arena(request, cut).bytes() <= request.device_budget &&
                        smallest_host_bytes(request, cut) <= request.host_budget;
      if (fits) cuts.push_back(cut);
    }
  }
  return cuts;
}

}  // namespace

// The fewest subproblems that fit never grow with the budget; up to twice as many are taken only
// where the budget brings the slots that let copies overlap.
BOOST_AUTO_TEST_CASE(more_device_memory_gives_more_subproblems_only_for_overlap) {
  for (std::uint64_t seed = first_seed; seed < first_seed + 200; ++seed) {
    Random random(seed);
    PlanRequest request = random_request(random);
    request.host_budget = random.chance(50) ? GiB : request.host_budget;
    std::optional<std::int64_t> least;
    for (double budget = 256; budget < 1e8; budget *= 1.3) {
      request.device_budget = static_cast<std::int64_t>(budget);
      const auto plan = try_plan(request);
      BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
        BOOST_REQUIRE(plan || !least);
        if (!plan) continue;
        const std::int64_t now = plan->subproblem_count();
        if (least) BOOST_REQUIRE_LE(now, (overlaps(*plan) ? 2 : 1) * *least);
        least = std::min(least.value_or(now), now);
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(at_most_twice_the_fewest_subproblems_on_tiles_as_large) {
  int fewest_taken = 0;
  int more_taken = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + 1000; ++seed) {
    Random random(seed);
    PlanRequest request = random_request(random);
    request.problem.query_length = random.magnitude(1, 400);
    request.problem.key_length = random.magnitude(1, 400);
    request.device_budget = random.magnitude(KiB, 1 * MiB);
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      const auto cuts = cuts_that_fit(request);
      const auto plan = try_plan(request);
      BOOST_REQUIRE_EQUAL(plan.has_value(), !cuts.empty());
      if (!plan) continue;
      const Cut& fewest = *std::min_element(cuts.begin(), cuts.end(), fewer);
      BOOST_REQUIRE_LE(plan->subproblem_count(), 2 * fewest.subproblems);
      BOOST_REQUIRE_GE(plan->division.tile(), fewest.tile);
      // Of those, the fewest that overlap; the fewest of all when none does.
      std::optional<Cut> overlapped;
      for (const Cut& cut : cuts) {
        if (cut.subproblems > 2 * fewest.subproblems || cut.tile < fewest.tile) continue;
        if (preferred_device_arena(request, cut).bytes() > request.device_budget) continue;
        if (!overlapped || fewer(cut, *overlapped)) overlapped = cut;
      }
      const Cut expected = overlapped.value_or(fewest);
      BOOST_REQUIRE_EQUAL(plan->division.chunk_count(), expected.c);
      BOOST_REQUIRE_EQUAL(plan->subproblem_count(), expected.subproblems);
      ++(plan->subproblem_count() > fewest.subproblems ? more_taken : fewest_taken);
    }
  }
  BOOST_TEST(fewest_taken > 100);
  BOOST_TEST(more_taken > 20);
}

// Near the smallest budget that works, room for overlap would cost many times the subproblems.
BOOST_AUTO_TEST_CASE(short_device_memory_gives_the_fewest_subproblems) {
  PlanRequest request;
  request.problem.query_length = request.problem.key_length = 32768;
  request.problem.head_dim = 64;
  request.problem.dtype = request.problem.output_dtype = DType::f16;
  request.problem.scale = default_scale(64);
  request.host_budget = 256 * MiB;
  for (const Mask mask : {Mask::none, Mask::causal}) {
    request.problem.mask = mask;
    for (const std::int64_t workspace : {std::int64_t{0}, 600 * KiB}) {
      request.device.workspace_bytes = workspace;
      for (const std::int64_t budget : {3 * MiB, 2100 * KiB, 2300 * KiB}) {
        request.device_budget = budget;
        const auto cuts = cuts_that_fit(request);
        BOOST_REQUIRE(!cuts.empty());
        const Plan plan = make_plan(request);
        const Cut& fewest = *std::min_element(cuts.begin(), cuts.end(), fewer);
        BOOST_TEST(plan.division.chunk_count() == fewest.c);
        BOOST_TEST(plan.division.tile() == fewest.tile);
        BOOST_TEST_MESSAGE("device " << budget << ", workspace " << workspace << ": c " << fewest.c
                                     << ", tile " << fewest.tile);
      }
    }
  }
}
