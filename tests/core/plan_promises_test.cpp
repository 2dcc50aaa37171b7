// What make_plan() promises: a budget that its errors name works, and none below it.
#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <map>
#include <optional>
#include <string>

#include "core/plan_requests.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/plan.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

std::string message_of(const PlanRequest& request) {
  try {
    make_plan(request);
  } catch (const InputError& error) {
    return error.what();
  }
  return "";
}

// The "(N bytes)" after `from` in a message, or "N B" when it is below 1 KiB.
std::int64_t bytes_in(const std::string& message, const std::string& from) {
  const std::size_t at = message.find(from);
  BOOST_REQUIRE_MESSAGE(at != std::string::npos, message);
  const std::string rest = message.substr(at + from.size());
  const std::size_t open = rest.find(" (");
  const std::size_t small = rest.find(" B");
  if (small < open) return std::stoll(rest);
  return std::stoll(rest.substr(open + 2));
}

bool works(PlanRequest request, std::int64_t device_budget, std::int64_t host_budget) {
  request.device_budget = device_budget;
  request.host_budget = host_budget;
  return message_of(request).empty();
}

// What a message says is short.
enum class Short { device, host, both, together };

Short what_is_short(const std::string& message) {
  if (message.find("too small together") != std::string::npos) return Short::together;
  if (message.find("both too small") != std::string::npos) return Short::both;
  BOOST_REQUIRE_MESSAGE(message.find("memory") == message.find(' ') + 1, message);
  return message.starts_with("device") ? Short::device : Short::host;
}

// Whether every budget that the message names works, and no smaller one does.
void check_named_budgets(const PlanRequest& request, const std::string& message) {
  constexpr const char* named = "that works for this problem is ";
  BOOST_TEST(message.find('\n') == std::string::npos);
  const std::int64_t device = request.device_budget;
  const std::int64_t host = request.host_budget;
  const std::int64_t least = bytes_in(message, named);
  std::int64_t least_host = host;
  const std::string hint = "with --scratch ";
  PlanRequest with_scratch = request;
  with_scratch.scratch = true;
  switch (what_is_short(message)) {
    case Short::device:
      BOOST_TEST(device < least);
      BOOST_TEST(works(request, least, host));
      BOOST_TEST(!works(request, least - 1, host));
      BOOST_TEST(!works(request, device, INT64_MAX / 4));
      if (message.find(hint) == std::string::npos) return;
      BOOST_TEST(bytes_in(message, hint) < least);
      BOOST_TEST(works(with_scratch, bytes_in(message, hint), host));
      BOOST_TEST(!works(with_scratch, bytes_in(message, hint) - 1, host));
      return;
    case Short::host:
      least_host = least;
      BOOST_TEST(!works(request, INT64_MAX / 4, host));
      break;
    case Short::both:
      least_host = bytes_in(message, "with a host budget of ");
      BOOST_TEST(works(request, least, least_host));
      BOOST_TEST(!works(request, least - 1, least_host));
      BOOST_TEST(!works(request, least, least_host - 1));
      BOOST_TEST(!works(request, least - 1, INT64_MAX / 4));
      break;
    case Short::together:
      BOOST_TEST(works(request, least, host));
      BOOST_TEST(!works(request, least - 1, host));
      least_host = bytes_in(message, "the smallest host budget is ");
      break;
  }
  const std::int64_t with_device =
      std::max(device, what_is_short(message) == Short::both ? least : 0);
  BOOST_TEST(host < least_host);
  BOOST_TEST(works(request, with_device, least_host));
  BOOST_TEST(!works(request, with_device, least_host - 1));
  if (message.find(hint) == std::string::npos) return;
  const std::int64_t hinted = bytes_in(message, hint);
  BOOST_TEST(hinted < least_host);
  BOOST_TEST(works(with_scratch, with_device, hinted));
}

// Budgets that are each enough beside more of the other: the least of the device's, and of the
// host's what another division needs. None where one division needs least of both.
std::optional<PlanRequest> short_together(PlanRequest request) {
  request.chunks = request.heads_per_group = std::nullopt;
  request.host_budget = INT64_MAX / 4;
  request.device_budget = smallest_device_budget(request);
  request.host_budget = 1;
  const std::string message = message_of(request);
  if (message.empty()) return std::nullopt;
  PlanRequest roomy = request;
  roomy.device_budget = INT64_MAX / 4;
  const std::string of_roomy = message_of(roomy);
  if (of_roomy.empty()) return std::nullopt;
  const std::string named = "that works for this problem is ";
  request.host_budget = bytes_in(of_roomy, named);
  if (message_of(request).empty()) return std::nullopt;
  return request;
}

}  // namespace

BOOST_AUTO_TEST_CASE(the_smallest_budget_named_is_exact) {
  std::map<Short, int> seen;
  for (std::uint64_t seed = first_seed; seed < first_seed + 1000; ++seed) {
    Random random(seed);
    PlanRequest request = random_shared_request(random);
    if (seed % 3 == 0) request = as_tiles(request, random);
    request.device_budget = random.magnitude(1, 64 * KiB);
    request.host_budget = random.magnitude(1, 256 * KiB);
    if (seed % 4 == 0) {
      const auto tight = short_together(request);
      if (!tight) continue;
      request = *tight;
    }
    const std::string message = message_of(request);
    if (message.empty()) continue;
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request) << ": " << message) {
      check_named_budgets(request, message);
      ++seen[what_is_short(message)];
    }
  }
  for (const Short each : {Short::device, Short::host, Short::both, Short::together})
    BOOST_TEST(seen[each] > 20, static_cast<int>(each) << " was seen " << seen[each] << " times");
}

BOOST_AUTO_TEST_CASE(the_smallest_device_budget_works_and_no_smaller_one_does) {
  std::int64_t found = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + 100; ++seed) {
    Random random(seed);
    PlanRequest request = random_request(random);
    std::int64_t smallest = 0;
    try {
      smallest = smallest_device_budget(request);
    } catch (const InputError&) {  // the host budget is too small for any
      request.device_budget = std::int64_t{1} << 60;
      BOOST_CHECK_THROW(make_plan(request), InputError);
      continue;
    }
    ++found;
    request.device_budget = smallest;
    BOOST_TEST(make_plan(request).device.bytes() <= smallest, "seed " << seed);
    --request.device_budget;
    BOOST_CHECK_THROW(make_plan(request), InputError);
  }
  BOOST_TEST(found > 50);
}

// Whoever shares a plan stays within the budgets; and what one rank has room for, each of several
// has, where they send partials to a master that merges alone.
BOOST_AUTO_TEST_CASE(every_rank_of_a_plan_is_within_the_budgets) {
  int sharing = 0, by_groups = 0, merging = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + 3000; ++seed) {
    Random random(seed);
    PlanRequest request = random_shared_request(random);
    request.workers = random.between(2, 9);
    const auto plan = try_plan(request);
    if (!plan) continue;
    const std::int64_t c = plan->division.chunk_count();
    const bool on_devices = plan->placement == AccumulatorPlacement::device;
    const auto within = [&](const auto& make) {
      try {
        const Plan own = make();
        BOOST_TEST(own.device.bytes() <= request.device_budget);
        BOOST_TEST(own.host.bytes() <= request.host_budget);
        BOOST_TEST(own.piece_tokens == plan->piece_tokens);
        return true;
      } catch (const InputError&) {
        return false;
      }
    };
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      const bool works = within([&] {
        return worker_plan(*plan, request.device, request.device_budget, request.host_budget);
      });
      BOOST_TEST((works || on_devices));
      ++(on_devices ? by_groups : sharing);
      for (std::int64_t rank = 0; rank <= request.mergers; ++rank) {
        const Range chunks = split(c, 1, request.mergers + 1, rank);
        merging += within(
            [&] { return merger_plan(*plan, request.workers, chunks, request.host_budget); });
      }
      if (request.mergers > 0) continue;
      const bool merges = within([&] { return master_plan(*plan, request.workers); });
      BOOST_TEST((merges || on_devices));
      within([&] { return master_plan(*plan, request.workers, true); });
    }
  }
  BOOST_TEST(sharing > 300);
  BOOST_TEST(by_groups > 100);
  BOOST_TEST(merging > 500);
}
