// Plans read back from what write_json wrote.
#include <fmt/format.h>

#include <algorithm>
#include <istream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

#include "core/plan_json.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {
namespace {

using Json = nlohmann::json;

// A part of a plan's text, short enough for a message.
std::string excerpt(const Json& json) {
  constexpr std::size_t longest = 60;
  const std::string text = json.dump(-1, ' ', true, Json::error_handler_t::replace);
  return text.size() > longest ? text.substr(0, longest) + "..." : text;
}

const Json& member(const Json& json, const char* key) {
  if (!json.is_object() || !json.contains(key)) throw InputError(fmt::format("has no '{}'", key));
  return json[key];
}

[[noreturn]] void fail_type(const Json& json, const char* key, const char* wanted) {
  throw InputError(fmt::format("'{}' is {}, not {}", key, excerpt(json.at(key)), wanted));
}

std::int64_t integer(const Json& json, const char* key) {
  const Json& value = member(json, key);
  if (!value.is_number_integer()) fail_type(json, key, "an integer");
  return value.get<std::int64_t>();
}

double number(const Json& json, const char* key) {
  const Json& value = member(json, key);
  if (!value.is_number()) fail_type(json, key, "a number");
  return value.get<double>();
}

bool boolean(const Json& json, const char* key) {
  const Json& value = member(json, key);
  if (!value.is_boolean()) fail_type(json, key, "true or false");
  return value.get<bool>();
}

std::string text(const Json& json, const char* key) {
  const Json& value = member(json, key);
  if (!value.is_string()) fail_type(json, key, "text");
  return value.get<std::string>();
}

std::optional<std::int64_t> optional_integer(const Json& json, const char* key) {
  if (member(json, key).is_null()) return std::nullopt;
  return integer(json, key);
}

std::optional<Grid> optional_grid(const Json& json, const char* key) {
  const Json& value = member(json, key);
  if (value.is_null()) return std::nullopt;
  if (!value.is_array() || value.size() != 2 || !value[0].is_number_integer() ||
      !value[1].is_number_integer()) {
    fail_type(json, key, "two integers");
  }
  return Grid{value[0].get<std::int64_t>(), value[1].get<std::int64_t>()};
}

template <typename Parse>
auto named(const Json& json, const char* key, const Parse& parse) {
  const auto value = parse(text(json, key));
  if (!value) throw InputError(fmt::format("'{}' is {}, not known", key, excerpt(json.at(key))));
  return *value;
}

std::optional<Mask> parse_mask(std::string_view name) {
  if (name == "none") return Mask::none;
  if (name == "causal") return Mask::causal;
  return std::nullopt;
}

std::optional<ScheduleOrder> parse_order(std::string_view name) {
  for (const auto order : {ScheduleOrder::groups_outer, ScheduleOrder::groups_inner}) {
    if (name == name_of(order)) return order;
  }
  return std::nullopt;
}

// Of a member that is left out where it is 0.
std::int64_t integer_or_0(const Json& json, const char* key) {
  return json.contains(key) ? integer(json, key) : 0;
}

Problem read_problem(const Json& json) {
  Problem problem;
  problem.batch = integer(json, "batch");
  problem.query_heads = integer(json, "query_heads");
  problem.kv_heads = integer(json, "kv_heads");
  problem.query_length = integer(json, "query_length");
  problem.key_length = integer(json, "key_length");
  problem.head_dim = integer(json, "head_dim");
  problem.dtype = named(json, "dtype", parse_dtype);
  problem.output_dtype = named(json, "output_dtype", parse_dtype);
  problem.mask = named(json, "mask", parse_mask);
  problem.scale = number(json, "scale");
  problem.queries_before = integer_or_0(json, "queries_before");
  problem.queries_after = integer_or_0(json, "queries_after");
  return problem;
}

InputTraits read_input(const Json& json) {
  return {named(json, "layout", parse_layout), boolean(json, "resident")};
}

DeviceTraits read_traits(const Json& device) {
  return {text(device, "kind"),
          text(device, "name"),
          integer(device, "tile"),
          integer(device, "slot_alignment"),
          integer(device, "workspace_bytes"),
          integer(device, "query_item_bytes"),
          integer(device, "key_item_bytes"),
          integer(device, "overlap_worth"),
          integer(device, "overlap_flop"),
          integer(device, "dispatch_flop"),
          integer(device, "threads"),
          boolean(device, "merges")};
}

PlanRequest read_request(const Json& plan) {
  const Json& json = member(plan, "request");
  const Json& memory = member(plan, "memory");
  PlanRequest request;
  request.problem = read_problem(member(plan, "problem"));
  request.device = read_traits(member(json, "device"));
  request.query = read_input(member(json, "query"));
  request.key = read_input(member(json, "key"));
  request.value = read_input(member(json, "value"));
  request.output_layout = named(json, "output_layout", parse_layout);
  request.lse = boolean(json, "lse");
  request.device_budget = integer(member(memory, "device"), "budget");
  request.host_budget = integer(member(memory, "host"), "budget");
  request.scratch = boolean(json, "scratch");
  request.workers = integer(json, "workers");
  request.mergers = integer_or_0(json, "mergers");
  request.host_accumulators = boolean(json, "host_accumulators");
  request.scheme = named(plan, "division", parse_scheme);
  if (request.scheme == Scheme::tiles) request.grid = optional_grid(json, "grid");
  request.chunks = optional_integer(json, "chunks");
  request.heads_per_group = optional_integer(json, "heads_per_group");
  if (json.contains("order")) request.order = named(json, "order", parse_order);
  return request;
}

// Where the byte numbered `byte` (from 1) of a stream lies; the number alone where the stream
// cannot be read again.
std::string place_in(std::istream& in, std::size_t byte) {
  in.clear();
  in.seekg(0);
  std::size_t line = 1, column = 1;
  for (std::size_t i = 1; i < byte && in; ++i) {
    const bool ends_line = in.get() == '\n';
    line += ends_line;
    column = ends_line ? 1 : column + 1;
  }
  return in ? fmt::format("at line {}, column {}", line, column) : fmt::format("at byte {}", byte);
}

// The list of subproblems may be far larger than memory.
Json parse_without_skipped(std::istream& in) {
  const auto keep = [](int depth, Json::parse_event_t event, const Json& parsed) {
    if (depth != 1 || event != Json::parse_event_t::key) return true;
    return std::ranges::find(skipped_keys, parsed.get_ref<const std::string&>()) ==
           skipped_keys.end();
  };
  try {
    return Json::parse(in, keep);
  } catch (const Json::parse_error& error) {
    throw InputError("is not JSON " + place_in(in, error.byte));
  } catch (const Json::exception&) {
    throw InputError("has a number that is too large");
  }
}

// Throws unless `json` says what `plan` is.
void require_equal(const Json& json, const Plan& plan) {
  std::stringstream text;
  write_json(plan, false, text);
  const Json expected = Json::parse(text);
  for (const auto& [key, value] : expected.items()) {
    if (member(json, key.c_str()) != value) {
      throw InputError(fmt::format(
          "'{}' is not what this version computes from the plan's problem, options and budgets",
          key));
    }
  }
  for (const auto& [key, value] : json.items()) {
    if (!expected.contains(key)) throw InputError(fmt::format("'{}' is not part of a plan", key));
  }
}

}  // namespace

DeviceTraits device_traits_from_json(const std::string& text) {
  std::istringstream in(text);
  return read_traits(parse_without_skipped(in));
}

Plan read_plan(std::istream& in, const std::string& name) {
  try {
    const Json json = parse_without_skipped(in);
    if (integer(json, "version") != Plan::version) {
      throw InputError(
          fmt::format("version {} is not {}", excerpt(json.at("version")), Plan::version));
    }
    Plan plan = make_plan(read_request(json));
    require_equal(json, plan);
    return plan;
  } catch (const InputError& error) {
    throw InputError(
        fmt::format("plan '{}' cannot be used: {}; make it with plan --json", name, error.what()));
  }
}

}  // namespace stream_cqsa
