// What plans are printed as: byte counts, JSON, the table, the drawing.
#include <fmt/format.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "core/plan_requests.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/plan.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

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

BOOST_AUTO_TEST_CASE(a_plan_printed_and_read_back_is_the_same) {
  for (std::uint64_t seed = first_seed; seed < first_seed + 3000; ++seed) {
    Random random(seed);
    PlanRequest request = random_shared_request(random);
    if (seed % 3 == 0) request = as_tiles(request, random);
    request.device.name = "a \"device\"\nof \\ two lines";
    const auto plan = try_plan(request);
    if (!plan) continue;
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      const std::string text = json_of(*plan);
      BOOST_REQUIRE_EQUAL(text, json_of(make_plan(request)));
      const bool few = plan->subproblem_count() * plan->division.chunk_count() <= 2000;
      for (const bool subproblems : {false, true}) {
        if (subproblems && !few) continue;
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
  request.chunks = 7;
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

BOOST_AUTO_TEST_CASE(text_that_is_no_plan_is_named_by_its_place) {
  const auto message_of = [](const std::string& text) -> std::string {
    std::stringstream in(text);
    try {
      read_plan(in, "my.json");
    } catch (const InputError& error) {
      return error.what();
    }
    return "nothing thrown";
  };
  const auto not_json = [](int line, int column) {
    return fmt::format(
        "plan 'my.json' cannot be used: is not JSON at line {}, column {}; make it with plan "
        "--json",
        line, column);
  };
  BOOST_TEST(message_of("") == not_json(1, 1));
  BOOST_TEST(message_of("{\n\"version\": 1,\n  x\n}") == not_json(3, 3));
  BOOST_TEST(message_of("{\"version\": 1,, \"c\": 7}") == not_json(1, 15));
  BOOST_TEST(message_of("{\n\"version\": 1") == not_json(2, 13));
  const std::string good = json_of(make_plan(large_request(4096, 4)));
  // The message for the plan with some text replaced.
  const auto changed = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    const auto at = text.find(from);
    BOOST_REQUIRE(at != std::string::npos);
    return message_of(text.replace(at, from.size(), to));
  };
  const auto says = [](const std::string& message, const std::string& part) {
    BOOST_TEST(message.find(part) != std::string::npos, message << " has no " << part);
    BOOST_TEST(message.find("[json") == std::string::npos);
    BOOST_TEST(message.find('\n') == std::string::npos);
  };
  says(changed("\"head_dim\"", "\"head_dims\""), "has no 'head_dim'");
  says(changed("\"request\"", "\"requests\""), "has no 'request'");
  says(changed("\"head_dim\":128", "\"head_dim\":\"x\""), "'head_dim' is \"x\", not an integer");
  says(changed("\"head_dim\":128", "\"head_dim\":1e999"), "number that is too large");
  says(changed("\"lse\":false", "\"lse\":0"), "'lse' is 0, not true or false");
  says(changed("\"causal\"", "\"casual\""), "'mask' is \"casual\", not known");
  says(changed("\"bf16\"", "null"), "'dtype' is null, not text");
  says(message_of("[1, 2]"), "has no 'version'");
  const std::string nested = std::string(99, '[') + std::string(99, ']');
  says(changed("\"kind\":\"cpu\"", "\"kind\":" + nested), "[[[..., not text");
}

BOOST_AUTO_TEST_CASE(a_plan_for_something_else_says_what_differs) {
  const PlanRequest planned = large_request(4096, 4);
  PlanRequest given = planned;
  // What a plan decides by itself, and what is for people, may differ.
  given.device_budget = given.host_budget = 1;
  given.chunks = given.heads_per_group = 3;
  given.scratch = true;
  given.device.name = "another";
  BOOST_TEST(mismatch(planned, given) == "");
  const auto differs = [&](const auto& change) {
    PlanRequest other = planned;
    change(other);
    return mismatch(planned, other);
  };
  using R = PlanRequest;
  BOOST_TEST(differs([](R& r) { r.problem.head_dim = 64; }) ==
             "for head_dim 128, the input has 64");
  BOOST_TEST(differs([](R& r) { r.problem.dtype = DType::f16; }) ==
             "for dtype bf16, the input has f16");
  BOOST_TEST(differs([](R& r) { r.problem.mask = Mask::none; }) ==
             "for mask causal, this run has none");
  BOOST_TEST(differs([](R& r) { r.problem.scale = 0.5; }).ends_with("this run has 0.5"));
  BOOST_TEST(differs([](R& r) { r.device.kind = "cuda"; }) ==
             "for device kind cpu, this run has cuda");
  BOOST_TEST(differs([](R& r) { r.value.layout = Layout::bhsd; }) ==
             "for value layout bshd, the input has bhsd");
  BOOST_TEST(differs([](R& r) { r.key.resident = true; }) ==
             "for key resident false, the input has true");
  BOOST_TEST(differs([](R& r) { r.lse = true; }) == "for lse false, this run has true");
  BOOST_TEST(differs([](R& r) { r.output_layout = Layout::bhsd; }) ==
             "for output_layout bshd, this run has bhsd");
  BOOST_TEST(differs([](R& r) { r.problem.batch = 2, r.device.tile = 64; }) ==
             "for batch 1, the input has 2; for device tile 128, this run has 64");
  for (const auto extent :
       {&Problem::query_heads, &Problem::kv_heads, &Problem::query_length, &Problem::key_length}) {
    BOOST_TEST(!differs([extent](R& r) { r.problem.*extent += 1; }).empty());
  }
}

BOOST_AUTO_TEST_CASE(rows_of_a_sequence_are_said) {
  PlanRequest request = large_request(1000, 4);
  BOOST_TEST(json_of(make_plan(request)).find("queries_") == std::string::npos);
  PlanRequest part = request;
  part.problem.queries_before = 200;
  part.problem.query_length = 100;
  part.problem.queries_after = 700;
  const Plan plan = make_plan(part);
  const auto problem = nlohmann::json::parse(json_of(plan))["problem"];
  BOOST_TEST(problem["query_length"] == 100);
  BOOST_TEST(problem["queries_before"] == 200);
  BOOST_TEST(problem["queries_after"] == 700);
  const std::string said = "query rows 200:300 of 1000 and 1000 key tokens, ";
  BOOST_TEST(describe(plan).find(said) != std::string::npos);
  std::stringstream drawing;
  write_svg(plan, drawing);
  BOOST_TEST(drawing.str().find(said) != std::string::npos);
  BOOST_TEST(mismatch(part, part) == "");
  PlanRequest other = part;
  other.problem.queries_before = 300;
  other.problem.queries_after = 600;
  BOOST_TEST(mismatch(part, other) ==
             "for queries_before 200, this run has 300; for queries_after 700, this run has 600");
  BOOST_TEST(mismatch(part, request).find("for queries_before 200, this run has 0") !=
             std::string::npos);
  BOOST_TEST(mismatch(request, part).find("for queries_before 0, this run has 200") !=
             std::string::npos);
}

BOOST_AUTO_TEST_CASE(one_of_a_thing_is_singular) {
  PlanRequest request = large_request(1, 1);
  request.chunks = 1;
  const std::string table = describe(make_plan(request));
  for (const char* part : {"1 token, 1 head of", "c = 1 chunk of up to 1 token,", "k = 1 chunk per",
                           "1 key/value head, 1 query head\n", "1 head group x 1 quorum\n",
                           "pieces of 1 query token\n"}) {
    BOOST_TEST(table.find(part) != std::string::npos, part << " is not in\n" << table);
  }
  std::stringstream drawing;
  write_svg(make_plan(request), drawing);
  BOOST_TEST(drawing.str().find("1 token, 1 query head, ") != std::string::npos);
  BOOST_TEST(drawing.str().find("c = 1 chunk;") != std::string::npos);
}

BOOST_AUTO_TEST_CASE(the_table_is_short_and_names_the_budgets) {
  for (std::uint64_t seed = first_seed; seed < first_seed + 200; ++seed) {
    Random random(seed);
    PlanRequest request = random_request(random);
    if (seed % 3 == 0) request = as_tiles(request, random);
    const auto plan = try_plan(request);
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
