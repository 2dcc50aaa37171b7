#define BOOST_TEST_MODULE plan
#include "stream_cqsa/plan.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/softmax_state.hpp"

using namespace stream_cqsa;

namespace {

constexpr std::uint64_t first_seed = 20260419;
constexpr std::int64_t KiB = 1024;
constexpr std::int64_t MiB = 1024 * KiB;
constexpr std::int64_t GiB = 1024 * MiB;

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  std::int64_t between(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }
  bool chance(int percent) { return between(1, 100) <= percent; }
  // Spread evenly over orders of magnitude.
  std::int64_t magnitude(std::int64_t low, std::int64_t high) {
    const std::int64_t top = between(low, high);
    return std::max(low, top >> between(0, 20));
  }

 private:
  std::mt19937_64 engine_;
};

InputTraits random_input(Random& random) {
  return {random.chance(70) ? Layout::bshd : Layout::bhsd, random.chance(20)};
}

PlanRequest random_request(Random& random) {
  constexpr DType types[] = {DType::f16, DType::bf16, DType::f32, DType::f64};
  PlanRequest request;
  Problem& problem = request.problem;
  problem.batch = random.between(1, 3);
  problem.kv_heads = random.between(1, 6);
  problem.query_heads = problem.kv_heads * random.between(1, 3);
  problem.query_length = random.magnitude(1, 3000);
  problem.key_length = random.chance(60) ? problem.query_length : random.magnitude(1, 3000);
  problem.head_dim = random.chance(50) ? 8 * random.between(1, 16) : random.between(1, 20);
  problem.dtype = types[random.between(0, 3)];
  problem.output_dtype = types[random.between(0, 3)];
  problem.mask = random.chance(50) ? Mask::causal : Mask::none;
  problem.scale = default_scale(problem.head_dim);
  request.device.tile = random.chance(70) ? std::int64_t{1} << random.between(0, 7) : 96;
  request.device.slot_alignment = std::int64_t{1} << random.between(0, 8);
  request.device.workspace_bytes = random.chance(50) ? 0 : 64 * random.between(1, 100);
  request.query = random_input(random);
  request.key = random_input(random);
  request.value = random_input(random);
  request.output_layout = random.chance(70) ? Layout::bshd : Layout::bhsd;
  request.lse = random.chance(50);
  request.scratch = random.chance(50);
  if (random.chance(30)) request.chunks = random.magnitude(1, 200);
  if (random.chance(30)) request.heads_per_group = random.between(1, problem.kv_heads);
  request.device_budget = random.magnitude(KiB, 16 * MiB);
  request.host_budget = random.magnitude(KiB, 64 * MiB);
  return request;
}

std::optional<Plan> try_plan(const PlanRequest& request) {
  try {
    return make_plan(request);
  } catch (const InputError&) {
    return std::nullopt;
  }
}

std::string json_of(const Plan& plan, bool subproblems = false) {
  std::stringstream out;
  write_json(plan, subproblems, out);
  return out.str();
}

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

std::string text_of(const PlanRequest& r) {
  const Problem& p = r.problem;
  return fmt::format("B{} Hq{} Hkv{} Nq{} Nk{} D{} tile {} device {} host {} chunks {} heads {}",
                     p.batch, p.query_heads, p.kv_heads, p.query_length, p.key_length, p.head_dim,
                     r.device.tile, r.device_budget, r.host_budget, r.chunks.value_or(0),
                     r.heads_per_group.value_or(0));
}

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
  BOOST_TEST(plan.device.workspace_bytes == plan.request.device.workspace_bytes);
  BOOST_TEST(plan.device.bytes() <= plan.request.device_budget);
  BOOST_TEST(plan.piece_tokens <= queries);
  BOOST_TEST(plan.host.state_buffer_bytes >=
             softmax_state_bytes(plan.piece_tokens * query_heads, dim));
}

void check_host_arena(const Plan& plan) {
  const PlanRequest& request = plan.request;
  const HostArena& host = plan.host;
  BOOST_TEST(host.bytes() <= request.host_budget);
  BOOST_TEST(host.state_buffers >= 2);
  BOOST_TEST(host.accumulators >= 1);
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

// Every live pair of every batch entry and group exactly once, in slots that there are.
void check_subproblems(const Plan& plan) {
  const std::int64_t c = plan.division.chunk_count();
  const auto groups = static_cast<std::int64_t>(plan.groups.size());
  std::vector<int> count(plan.problem().batch * groups * c * c, 0);
  for (std::int64_t id = 0; id < plan.subproblem_count(); ++id) {
    const SubproblemKey key = plan.key(id);
    BOOST_REQUIRE_EQUAL(plan.id(key), id);
    BOOST_REQUIRE(key.batch >= 0 && key.batch < plan.problem().batch);
    BOOST_REQUIRE(key.group >= 0 && key.group < groups);
    BOOST_REQUIRE(key.quorum >= 0 && key.quorum < c);
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
    BOOST_REQUIRE_LE(static_cast<std::int64_t>(queries.size()), plan.device.query_slots);
    BOOST_REQUIRE_LE(static_cast<std::int64_t>(queries.size()), plan.device.state_slots);
    BOOST_REQUIRE_LE(static_cast<std::int64_t>(keys.size()), plan.device.kv_slots);
    BOOST_REQUIRE_LE(plan.device_bytes(work), plan.device.bytes());
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

PlanRequest large_request(std::int64_t length, std::int64_t heads) {
  PlanRequest request;
  request.problem = {1,   heads,       heads,       length,       length,
                     128, DType::bf16, DType::bf16, Mask::causal, default_scale(128)};
  request.device_budget = 64 * GiB;
  request.host_budget = std::int64_t{1} << 44;
  return request;
}

}  // namespace

BOOST_AUTO_TEST_CASE(byte_counts_are_parsed) {
  BOOST_TEST(parse_bytes("4096", "x") == 4096);
  BOOST_TEST(parse_bytes("0", "x") == 0);
  BOOST_TEST(parse_bytes("10B", "x") == 10);
  BOOST_TEST(parse_bytes("256KiB", "x") == 256 * KiB);
  BOOST_TEST(parse_bytes("512 MiB", "x") == 512 * MiB);
  BOOST_TEST(parse_bytes("2gib", "x") == 2 * GiB);
  BOOST_TEST(parse_bytes("1TiB", "x") == 1024 * GiB);
  BOOST_TEST(parse_bytes("1.5GB", "x") == 1500000000);
  BOOST_TEST(parse_bytes("3kB", "x") == 3000);
  BOOST_TEST(parse_bytes("3KB", "x") == 3000);
  BOOST_TEST(parse_bytes("7MB", "x") == 7000000);
  BOOST_TEST(parse_bytes("2TB", "x") == 2000000000000);
  BOOST_TEST(parse_bytes("0.5KiB", "x") == 512);
  BOOST_TEST(parse_bytes("9223372036854775807", "x") == INT64_MAX);
  BOOST_TEST(parse_bytes("8388607TiB", "x") == std::int64_t{8388607} << 40);
}

BOOST_AUTO_TEST_CASE(bad_byte_counts_are_refused) {
  for (const char* text : {"",
                           " ",
                           "GiB",
                           "-1",
                           "+1",
                           "1 2",
                           "1.2.3GiB",
                           "1.GiB",
                           ".5GiB",
                           "1e9",
                           "0x10",
                           "12Gi B",
                           "4 GiB ",
                           " 4",
                           "1PiB",
                           "nan",
                           "inf",
                           "9223372036854775808",
                           "8388608TiB",
                           "99999999999999999999999",
                           "8388607.9999999TiB",
                           "1..5"}) {
    BOOST_CHECK_EXCEPTION(
        parse_bytes(text, "--device-memory"), InputError, [](const InputError& error) {
          const std::string message = error.what();
          return message.find("--device-memory") == 0 && message.find('\n') == std::string::npos;
        });
  }
}

BOOST_AUTO_TEST_CASE(byte_counts_are_printed) {
  BOOST_TEST(format_bytes(0) == "0 B");
  BOOST_TEST(format_bytes(1023) == "1023 B");
  BOOST_TEST(format_bytes(1024) == "1.00 KiB");
  BOOST_TEST(format_bytes(3 * GiB / 2) == "1.50 GiB");
  BOOST_TEST(format_bytes(std::int64_t{1} << 52) == "4096.00 TiB");
}

BOOST_AUTO_TEST_CASE(random_requests_give_sound_plans) {
  int planned = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + 3000; ++seed) {
    Random random(seed);
    const PlanRequest request = random_request(random);
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      const auto plan = try_plan(request);
      if (!plan) continue;
      ++planned;
      check_device_arena(*plan);
      check_host_arena(*plan);
      check_groups(*plan);
      if (request.chunks) BOOST_TEST(plan->division.chunk_count() == *request.chunks);
      const std::int64_t work = plan->subproblem_count() * plan->division.chunk_count();
      if (work <= 4000) check_subproblems(*plan);
    }
  }
  BOOST_TEST(planned > 1000);
}

BOOST_AUTO_TEST_CASE(ids_number_the_schedule) {
  for (std::uint64_t seed = first_seed; seed < first_seed + 300; ++seed) {
    Random random(seed);
    auto plan = try_plan(random_request(random));
    if (!plan) continue;
    for (const auto order : {ScheduleOrder::groups_outer, ScheduleOrder::groups_inner}) {
      plan->order = order;
      std::int64_t id = 0;
      const std::int64_t c = plan->division.chunk_count();
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

BOOST_AUTO_TEST_CASE(the_smallest_budget_named_is_exact) {
  int device_short = 0;
  int host_short = 0;
  int both_short = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + 600; ++seed) {
    Random random(seed);
    PlanRequest request = random_request(random);
    request.device_budget = random.magnitude(1, 64 * KiB);
    request.host_budget = random.magnitude(1, 256 * KiB);
    const std::string message = message_of(request);
    if (message.empty()) continue;
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request) << ": " << message) {
      BOOST_TEST(message.find('\n') == std::string::npos);
      if (message.find("both") != std::string::npos) {
        ++both_short;
        request.host_budget = bytes_in(message, "with a host budget of ");
        request.device_budget = bytes_in(message, "that works for this problem is ");
        BOOST_TEST(message_of(request) == "");
        --request.host_budget;
        BOOST_TEST(message_of(request) != "");
        ++request.host_budget;
        --request.device_budget;
        BOOST_TEST(message_of(request) != "");
        continue;
      }
      const bool device = message.find("device memory") == 0;
      ++(device ? device_short : host_short);
      std::int64_t& budget = device ? request.device_budget : request.host_budget;
      const std::int64_t least = bytes_in(message, "that works for this problem is ");
      BOOST_TEST(budget < least);
      budget = least;
      BOOST_TEST(message_of(request) == "");
      budget = least - 1;
      BOOST_TEST(message_of(request) != "");
      if (const std::string hint = "with --scratch "; message.find(hint) != std::string::npos) {
        budget = bytes_in(message, hint);
        request.scratch = true;
        BOOST_TEST(message_of(request) == "");
      }
    }
  }
  BOOST_TEST(device_short > 20);
  BOOST_TEST(host_short > 20);
  BOOST_TEST(both_short > 20);
}

BOOST_AUTO_TEST_CASE(more_device_memory_never_gives_more_subproblems) {
  for (std::uint64_t seed = first_seed; seed < first_seed + 200; ++seed) {
    Random random(seed);
    PlanRequest request = random_request(random);
    request.host_budget = random.chance(50) ? GiB : request.host_budget;
    std::int64_t count = INT64_MAX;
    for (double budget = 256; budget < 1e8; budget *= 1.3) {
      request.device_budget = static_cast<std::int64_t>(budget);
      const auto plan = try_plan(request);
      BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
        BOOST_REQUIRE(plan || count == INT64_MAX);
        if (!plan) continue;
        BOOST_REQUIRE_LE(plan->subproblem_count(), count);
        count = plan->subproblem_count();
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(a_plan_printed_and_read_back_is_the_same) {
  for (std::uint64_t seed = first_seed; seed < first_seed + 400; ++seed) {
    Random random(seed);
    PlanRequest request = random_request(random);
    request.device.name = "a \"device\"\nof \\ two lines";
    const auto plan = try_plan(request);
    if (!plan || plan->subproblem_count() * plan->division.chunk_count() > 20000) continue;
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      const std::string text = json_of(*plan);
      BOOST_REQUIRE_EQUAL(text, json_of(make_plan(request)));
      for (const bool subproblems : {false, true}) {
        std::stringstream in(json_of(*plan, subproblems));
        const Plan again = read_plan(in, "plan.json");
        BOOST_REQUIRE(again.request == request);
        BOOST_REQUIRE(again.device == plan->device);
        BOOST_REQUIRE(again.host == plan->host);
        BOOST_REQUIRE(again.order == plan->order);
        BOOST_REQUIRE_EQUAL(json_of(again), text);
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(json_names_every_subproblem_and_its_pairs) {
  PlanRequest request = large_request(7 * 256, 2);
  request.chunks = 7;
  request.heads_per_group = 1;
  const Plan plan = make_plan(request);
  const auto json = nlohmann::json::parse(json_of(plan, true));
  BOOST_TEST(json["version"] == 1);
  BOOST_TEST(json["c"] == 7);
  BOOST_TEST(json["cover"] == nlohmann::json({0, 1, 3}));
  BOOST_TEST(json["responsibilities"].size() == 7u);
  BOOST_TEST(json["query_chunks"][1] == nlohmann::json({256, 512}));
  BOOST_TEST(json["key_chunks"][6] == nlohmann::json({1536, 1792}));
  BOOST_TEST(json["head_groups"] == nlohmann::json({{0, 1}, {1, 1}}));
  BOOST_TEST(json["subproblem_count"] == 14);
  BOOST_TEST(json["memory"]["device"]["planned"] == plan.device.bytes());
  BOOST_TEST(json["memory"]["host"]["planned"] == plan.host.bytes());
  BOOST_TEST(json["subproblems"].size() == 14u);
  const auto& second = json["subproblems"][plan.id({0, 0, 2})];
  BOOST_TEST(second["head_group"] == nlohmann::json({0, 1}));
  BOOST_TEST(second["chunks"] == nlohmann::json({2, 3, 5}));
  // One live order of each pair of the header's worked example.
  BOOST_TEST(second["pairs"] ==
             nlohmann::json({{2, 2, "partial"}, {3, 2, "full"}, {5, 2, "full"}, {5, 3, "full"}}));
  BOOST_TEST(second["device_bytes"] == plan.device_bytes(plan.work(plan.id({0, 0, 2}))));
}

BOOST_AUTO_TEST_CASE(a_plan_that_disagrees_is_refused) {
  PlanRequest request = large_request(4096, 4);
  request.device_budget = 8 * MiB;
  const nlohmann::json good = nlohmann::json::parse(json_of(make_plan(request)));
  const auto refused = [&](const std::string& text, const std::string& word) {
    std::stringstream in(text);
    BOOST_CHECK_EXCEPTION(read_plan(in, "my.json"), InputError, [&](const InputError& error) {
      const std::string message = error.what();
      const bool fine = message.find("my.json") != std::string::npos &&
                        message.find(word) != std::string::npos &&
                        message.find('\n') == std::string::npos;
      if (!fine) BOOST_TEST_MESSAGE(message);
      return fine;
    });
  };
  for (const auto& [key, value] : good.items()) {
    nlohmann::json changed = good;
    changed.erase(key);
    refused(changed.dump(), key);
    changed[key] = "something else";
    refused(changed.dump(), "my.json");
    changed[key] = -1;
    refused(changed.dump(), "my.json");
  }
  nlohmann::json changed = good;
  changed["cover"][1] = changed["cover"][1].get<int>() + 1;
  refused(changed.dump(), "cover");
  changed = good;
  changed["memory"]["device"]["budget"] = 1000;
  refused(changed.dump(), "too small");
  changed = good;
  changed["memory"]["host"]["planned"] = 1;
  refused(changed.dump(), "memory");
  changed = good;
  changed["problem"]["query_length"] = 1e300;
  refused(changed.dump(), "1e+300");
  changed = good;
  changed["problem"]["batch"] = 18446744073709551615u;
  refused(changed.dump(), "my.json");
  changed = good;
  changed["version"] = 2;
  refused(changed.dump(), "version");
  changed = good;
  changed["extra"] = 2;
  refused(changed.dump(), "extra");
  const std::string text = good.dump();
  for (std::size_t length = 0; length < text.size(); length += 97) {
    refused(text.substr(0, length), "my.json");
  }
  refused("[]", "my.json");
  refused("null", "my.json");
  refused(std::string(100000, '['), "my.json");
  refused("\xff\xfe{", "my.json");
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
  request.device_budget = 24 * MiB;
  request.host_budget = 2 * GiB;
  request.scratch = true;
  const Plan rows = make_plan(request);
  BOOST_REQUIRE(rows.groups.size() > 1u);
  request.query.layout = request.key.layout = request.value.layout = Layout::bhsd;
  BOOST_TEST((make_plan(request).order == ScheduleOrder::groups_outer));
  request.query.resident = request.key.resident = request.value.resident = true;
  BOOST_TEST((make_plan(request).order == ScheduleOrder::groups_outer));
  BOOST_TEST(make_plan(request).host.cache_blocks == 0);
}

BOOST_AUTO_TEST_CASE(very_long_sequences) {
  PlanRequest request = large_request(std::int64_t{1} << 30, 4);
  request.scratch = true;
  request.host_budget = 64 * GiB;
  const Plan plan = make_plan(request);
  BOOST_TEST(plan.device.bytes() <= request.device_budget);
  BOOST_TEST(plan.host.bytes() <= request.host_budget);
  BOOST_TEST((plan.placement == AccumulatorPlacement::file));
  BOOST_TEST(describe(plan).size() < 4000u);
  for (const std::int64_t c : {11557, 16257, 20000}) {
    request.chunks = c;
    const Plan divided = make_plan(request);
    BOOST_TEST(divided.division.chunk(c - 1).queries.end == request.problem.query_length);
    const QuorumWork work = divided.work(divided.subproblem_count() - 1);
    BOOST_TEST(!work.pairs.empty());
    BOOST_TEST(divided.device_bytes(work) <= divided.device.bytes());
    std::stringstream in(json_of(divided));
    BOOST_TEST((read_plan(in, "large").device == divided.device));
  }
}

BOOST_AUTO_TEST_CASE(the_table_is_short_and_names_the_budgets) {
  for (std::uint64_t seed = first_seed; seed < first_seed + 200; ++seed) {
    Random random(seed);
    const auto plan = try_plan(random_request(random));
    if (!plan) continue;
    const std::string table = describe(*plan);
    BOOST_TEST(std::count(table.begin(), table.end(), '\n') < 40);
    BOOST_TEST(table.find(format_bytes(plan->request.device_budget)) != std::string::npos);
    BOOST_TEST(table.find(format_bytes(plan->request.host_budget)) != std::string::npos);
  }
}

BOOST_AUTO_TEST_CASE(drawings_are_bounded_and_closed) {
  for (const std::int64_t c : {1, 2, 7, 57, 200, 201, 5000, 20000}) {
    PlanRequest request = large_request(1 << 20, 1);
    request.chunks = c;
    std::stringstream out;
    write_svg(make_plan(request), out);
    const std::string svg = out.str();
    BOOST_TEST(svg.find("<svg") == 0u);
    BOOST_TEST(svg.size() < 4000000u);
    BOOST_TEST(svg.substr(svg.size() - 7) == "</svg>\n");
    BOOST_TEST(svg.find("query chunk") != std::string::npos);
    BOOST_TEST(svg.find("key chunk") != std::string::npos);
    BOOST_TEST(svg.find("nan") == std::string::npos);
  }
}
