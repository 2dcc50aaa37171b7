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
  const Cut cut = cut_of(plan);
  return preferred_device_arena(plan.request, cut).bytes() <= plan.request.device_budget;
}

bool fewer(const Cut& x, const Cut& y) {
  return std::pair(x.subproblems, x.c) < std::pair(y.subproblems, y.c);
}

using Arena = DeviceArena (*)(const PlanRequest&, const Cut&);

// Every c with every number of head groups for which this device arena fits, and the smallest of
// the host.
std::vector<Cut> cuts_that_fit(const PlanRequest& request, Arena arena = minimum_device_arena) {
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
      const bool fits = arena(request, cut).bytes() <= request.device_budget &&
                        smallest_host_bytes(request, cut) <= request.host_budget;
      if (fits) cuts.push_back(cut);
    }
  }
  return cuts;
}

// How many of the subproblems that a run could have for `flop_each` it should have: 1 to `most`.
std::int64_t wanted(const Problem& problem, std::int64_t flop_each, std::int64_t most) {
  const auto scores =
      static_cast<double>(problem.live_scores({0, problem.query_length}, {0, problem.key_length}));
  const double flop = 4 * scores * static_cast<double>(problem.head_dim * problem.query_heads) *
                      static_cast<double>(problem.batch);
  return static_cast<std::int64_t>(
      std::clamp(flop / static_cast<double>(flop_each), 1.0, static_cast<double>(most)));
}

// The fewest subproblems that overlap and are at least `least`, at most `most`, on tiles no smaller
// than those of the fewest of all; else the fewest of all. For workers that share head groups.
Cut expected_cut_of_quorums(const PlanRequest& request, const std::vector<Cut>& fitting) {
  const DeviceTraits& device = request.device;
  const Cut& fewest = *std::min_element(fitting.begin(), fitting.end(), fewer);
  const std::int64_t shared =
      request.workers == 1 ? 1
                           : wanted(request.problem, device.dispatch_flop, 24 * request.workers);
  const std::int64_t overlapping =
      device.overlap_flop == 0 ? 1
                               : wanted(request.problem, device.overlap_flop, device.overlap_worth);
  const std::int64_t least = std::max(shared, overlapping);
  const std::int64_t most = std::max(device.overlap_worth * fewest.subproblems, 2 * shared);
  std::optional<Cut> overlapped;
  for (const Cut& cut : fitting) {
    if (cut.subproblems < least || cut.subproblems > most || cut.tile < fewest.tile) continue;
    if (preferred_device_arena(request, cut).bytes() > request.device_budget) continue;
    if (!overlapped || fewer(cut, *overlapped)) overlapped = cut;
  }
  return overlapped.value_or(fewest);
}

// Where no whole quorum fits the fewest that can be computed in parts; none where nothing fits.
std::optional<Cut> expected_cut(const PlanRequest& request) {
  if (const auto whole = cuts_that_fit(request); !whole.empty())
    return expected_cut_of_quorums(request, whole);
  const auto parts = cuts_that_fit(request, smallest_device_arena);
  if (parts.empty()) return std::nullopt;
  return *std::min_element(parts.begin(), parts.end(), fewer);
}

bool in_parts(const Plan& plan) {
  const Cut cut = cut_of(plan);
  return minimum_device_arena(plan.request, cut).bytes() > plan.request.device_budget;
}

}  // namespace

// The fewest subproblems that fit never grow with either budget; more are taken only where the
// budget brings the slots that let copies overlap, whole quorums instead of parts of them, or where
// several workers share them.
BOOST_AUTO_TEST_CASE(more_memory_gives_more_subproblems_only_for_overlap) {
  int compared = 0, parts = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + 400; ++seed) {
    Random random(seed);
    PlanRequest request = random_shared_request(random);
    if (random.chance(70)) request.workers = 1;
    if (random.chance(50)) request.host_budget = GiB;
    std::int64_t& budget = random.chance(50) ? request.device_budget : request.host_budget;
    // For several workers: 24 each, at most twice that.
    const std::int64_t shared = request.workers > 1 ? 48 * request.workers : 0;
    std::optional<std::int64_t> least, least_of_parts;
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      for (double bytes = 256; bytes < 1e8; bytes *= 1.3) {
        budget = static_cast<std::int64_t>(bytes);
        const auto plan = try_plan(request);
        BOOST_REQUIRE(plan || (!least && !least_of_parts));
        if (!plan) continue;
        const std::int64_t now = plan->subproblem_count();
        if (in_parts(*plan)) {
          ++parts;
          BOOST_REQUIRE(!least || &budget == &request.host_budget);
          BOOST_REQUIRE_LE(now, least_of_parts.value_or(now));
          least_of_parts = now;
          continue;
        }
        const std::int64_t worth = overlaps(*plan) ? request.device.overlap_worth : 1;
        if (least) BOOST_REQUIRE_LE(now, std::max(worth * *least, shared));
        least = std::min(least.value_or(now), now);
        ++compared;
      }
    }
  }
  BOOST_TEST(compared > 5000);
  BOOST_TEST(parts > 100);
}

BOOST_AUTO_TEST_CASE(the_cut_is_the_one_that_an_exhaustive_search_finds) {
  int in_parts_taken = 0;
  int fewest_taken = 0;
  int more_taken = 0;
  int for_overlap = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + 3000; ++seed) {
    Random random(seed);
    PlanRequest request = random_shared_request(random);
    if (random.chance(80)) request.chunks = std::nullopt;
    request.problem.query_length = random.magnitude(1, 400);
    request.problem.key_length = random.magnitude(1, 400);
    request.device_budget = random.magnitude(KiB, 1 * MiB);
    request.host_accumulators = request.host_accumulators || request.workers > 1;
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      const auto cuts = cuts_that_fit(request);
      const auto plan = try_plan(request);
      const auto expected = expected_cut(request);
      BOOST_REQUIRE_EQUAL(plan.has_value(), expected.has_value());
      if (!plan) continue;
      BOOST_REQUIRE_EQUAL(plan->division.chunk_count(), expected->c);
      BOOST_REQUIRE_EQUAL(plan->subproblem_count(), expected->subproblems);
      BOOST_REQUIRE_EQUAL(in_parts(*plan), cuts.empty());
      in_parts_taken += cuts.empty();
      if (cuts.empty()) continue;
      const Cut& fewest = *std::min_element(cuts.begin(), cuts.end(), fewer);
      BOOST_REQUIRE_GE(plan->division.tile(), fewest.tile);
      ++(plan->subproblem_count() > fewest.subproblems ? more_taken : fewest_taken);
      for_overlap += plan->subproblem_count() > 2 * fewest.subproblems;
    }
  }
  BOOST_TEST(in_parts_taken > 50);
  BOOST_TEST(fewest_taken > 200);
  BOOST_TEST(more_taken > 80);
  BOOST_TEST(for_overlap > 20);
}

// Of 20,000 divisions for each number of head groups.
BOOST_AUTO_TEST_CASE(a_billion_tokens_get_the_cut_that_an_exhaustive_search_finds) {
  PlanRequest request = large_request(std::int64_t{1} << 30, 8);
  request.host_budget = 64 * GiB;
  request.scratch = true;
  for (const std::int64_t device : {8, 10, 16, 80}) {
    request.device_budget = device * GiB;
    for (const std::int64_t heads : {1, 3, 8}) {
      request.heads_per_group = heads;
      const auto plan = try_plan(request);
      const auto expected = expected_cut(request);
      BOOST_REQUIRE_EQUAL(plan.has_value(), expected.has_value());
      if (!plan) continue;
      BOOST_TEST(plan->division.chunk_count() == expected->c);
      BOOST_TEST(plan->subproblem_count() == expected->subproblems);
      if (device == 8) BOOST_TEST(in_parts(*plan));
    }
  }
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
