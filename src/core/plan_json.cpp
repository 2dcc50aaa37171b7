#include <fmt/format.h>

#include <istream>
#include <nlohmann/json.hpp>
#include <ostream>
#include <sstream>

#include "stream_cqsa/error.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {
namespace {

using OrderedJson = nlohmann::ordered_json;  // written: in the order that people read
using Json = nlohmann::json;                 // read: in any order

constexpr std::string_view subproblems_key = "subproblems";

std::string_view name_of(Mask mask) { return mask == Mask::causal ? "causal" : "none"; }

std::string_view name_of(ScheduleOrder order) {
  return order == ScheduleOrder::groups_outer ? "groups_outer" : "groups_inner";
}

std::string_view name_of(AccumulatorPlacement placement) {
  return placement == AccumulatorPlacement::memory ? "memory"
         : placement == AccumulatorPlacement::file ? "file"
                                                   : "device";
}

OrderedJson problem_json(const Problem& problem) {
  return {{"batch", problem.batch},           {"query_heads", problem.query_heads},
          {"kv_heads", problem.kv_heads},     {"query_length", problem.query_length},
          {"key_length", problem.key_length}, {"head_dim", problem.head_dim},
          {"dtype", name_of(problem.dtype)},  {"output_dtype", name_of(problem.output_dtype)},
          {"mask", name_of(problem.mask)},    {"scale", problem.scale}};
}

OrderedJson input_json(const InputTraits& input) {
  return {{"layout", name_of(input.layout)}, {"resident", input.resident}};
}

OrderedJson optional_json(const std::optional<std::int64_t>& value) {
  return value ? OrderedJson(*value) : OrderedJson(nullptr);
}

// What a plan follows from, besides the problem and the budgets.
OrderedJson request_json(const PlanRequest& request) {
  const DeviceTraits& device = request.device;
  return {{"device",
           {{"kind", device.kind},
            {"name", device.name},
            {"tile", device.tile},
            {"slot_alignment", device.slot_alignment},
            {"workspace_bytes", device.workspace_bytes},
            {"query_item_bytes", device.query_item_bytes},
            {"key_item_bytes", device.key_item_bytes},
            {"overlap_worth", device.overlap_worth},
            {"overlap_flop", device.overlap_flop},
            {"dispatch_flop", device.dispatch_flop},
            {"merges", device.merges}}},
          {"query", input_json(request.query)},
          {"key", input_json(request.key)},
          {"value", input_json(request.value)},
          {"output_layout", name_of(request.output_layout)},
          {"lse", request.lse},
          {"scratch", request.scratch},
          {"workers", request.workers},
          {"host_accumulators", request.host_accumulators},
          {"chunks", optional_json(request.chunks)},
          {"heads_per_group", optional_json(request.heads_per_group)}};
}

OrderedJson accumulators_json(const Plan& plan) {
  return {{"placement", name_of(plan.placement)},
          {"in_memory", plan.host.accumulators},
          {"bytes_each", plan.host.accumulator_bytes},
          {"piece_tokens", plan.piece_tokens},
          {"scratch_bytes", plan.scratch_bytes}};
}

OrderedJson memory_json(const Plan& plan) {
  const DeviceArena& device = plan.device;
  const HostArena& host = plan.host;
  return {{"device",
           {{"budget", plan.request.device_budget},
            {"planned", device.bytes()},
            {"query_slots", device.query_slots},
            {"query_slot_bytes", device.query_slot_bytes},
            {"kv_slots", device.kv_slots},
            {"kv_slot_bytes", device.kv_slot_bytes},
            {"state_slots", device.state_slots},
            {"state_slot_bytes", device.state_slot_bytes},
            {"output_slots", device.output_slots},
            {"output_slot_bytes", device.output_slot_bytes},
            {"workspace_bytes", device.workspace_bytes}}},
          {"host",
           {{"budget", plan.request.host_budget},
            {"planned", host.bytes()},
            {"cache_blocks", host.cache_blocks},
            {"cache_block_bytes", host.cache_block_bytes},
            {"query_block_tokens", plan.query_block_tokens},
            {"key_block_tokens", plan.key_block_tokens},
            {"state_buffers", host.state_buffers},
            {"state_buffer_bytes", host.state_buffer_bytes},
            {"accumulators", host.accumulators},
            {"accumulator_bytes", host.accumulator_bytes},
            {"output_buffers", host.output_buffers},
            {"output_buffer_bytes", host.output_buffer_bytes}}}};
}

// Writes [element(0), element(1), ...], where element gives an element's text.
template <typename Element>
void write_list(std::ostream& out, std::int64_t count, const Element& element) {
  out << '[';
  for (std::int64_t i = 0; i < count; ++i) out << (i == 0 ? "" : ",") << element(i);
  out << ']';
}

// Text that need not be UTF-8 (a device's name) must not stop a plan from being written.
template <typename AnyJson>
std::string text_of(const AnyJson& json) {
  return json.dump(-1, ' ', false, AnyJson::error_handler_t::replace);
}

void write_division(const Plan& plan, std::ostream& out) {
  const Division& division = plan.division;
  const auto& residues = division.cover().residues;
  const auto range_text = [](Range range) {
    return fmt::format("[{},{}]", range.begin, range.end);
  };
  out << ",\n\"c\": " << division.chunk_count() << ",\n\"tile\": " << division.tile();
  out << ",\n\"cover\": ";
  write_list(out, division.quorum_size(), [&](std::int64_t i) { return residues[i]; });
  out << ",\n\"responsibilities\": ";
  write_list(out, division.chunk_count(), [&](std::int64_t d) {
    const Responsibility r = division.responsibilities()[d];
    return fmt::format("[{},{}]", residues[r.query], residues[r.key]);
  });
  out << ",\n\"query_chunks\": ";
  write_list(out, division.chunk_count(),
             [&](std::int64_t i) { return range_text(division.chunk(i).queries); });
  out << ",\n\"key_chunks\": ";
  write_list(out, division.chunk_count(),
             [&](std::int64_t i) { return range_text(division.chunk(i).keys); });
  out << ",\n\"head_groups\": ";
  write_list(out, static_cast<std::int64_t>(plan.groups.size()), [&](std::int64_t i) {
    return fmt::format("[{},{}]", plan.groups[i].first, plan.groups[i].count);
  });
}

void write_subproblem(const Plan& plan, std::int64_t id, std::ostream& out) {
  const SubproblemKey key = plan.key(id);
  const HeadGroup& group = plan.groups[key.group];
  const QuorumWork work = plan.work(id);
  out << fmt::format("{{\"id\":{},\"batch\":{},\"head_group\":[{},{}],\"chunks\":", id, key.batch,
                     group.first, group.count);
  write_list(out, static_cast<std::int64_t>(work.chunks.size()),
             [&](std::int64_t i) { return work.chunks[i].index; });
  out << ",\"pairs\":";
  write_list(out, static_cast<std::int64_t>(work.pairs.size()), [&](std::int64_t i) {
    const ChunkPair& pair = work.pairs[i];
    return fmt::format("[{},{},\"{}\"]", work.chunks[pair.query].index, work.chunks[pair.key].index,
                       pair.liveness == Liveness::full ? "full" : "partial");
  });
  out << ",\"device_bytes\":" << plan.device_bytes(work) << '}';
}

std::int64_t integer(const Json& json) {
  if (!json.is_number_integer())
    throw InputError(fmt::format("'{}' is not an integer", text_of(json)));
  return json.get<std::int64_t>();
}

template <typename Parse>
auto named(const Json& json, const Parse& parse) {
  const auto name = json.get<std::string>();
  const auto value = parse(name);
  if (!value) throw InputError(fmt::format("'{}' is not known", name));
  return *value;
}

Problem read_problem(const Json& json) {
  Problem problem;
  problem.batch = integer(json.at("batch"));
  problem.query_heads = integer(json.at("query_heads"));
  problem.kv_heads = integer(json.at("kv_heads"));
  problem.query_length = integer(json.at("query_length"));
  problem.key_length = integer(json.at("key_length"));
  problem.head_dim = integer(json.at("head_dim"));
  problem.dtype = named(json.at("dtype"), parse_dtype);
  problem.output_dtype = named(json.at("output_dtype"), parse_dtype);
  problem.mask = json.at("mask") == name_of(Mask::causal) ? Mask::causal : Mask::none;
  problem.scale = json.at("scale").get<double>();
  return problem;
}

InputTraits read_input(const Json& json) {
  return {named(json.at("layout"), parse_layout), json.at("resident").get<bool>()};
}

std::optional<std::int64_t> read_optional(const Json& json) {
  return json.is_null() ? std::nullopt : std::optional(integer(json));
}

PlanRequest read_request(const Json& plan) {
  const Json& json = plan.at("request");
  const Json& device = json.at("device");
  PlanRequest request;
  request.problem = read_problem(plan.at("problem"));
  request.device = {device.at("kind").get<std::string>(),
                    device.at("name").get<std::string>(),
                    integer(device.at("tile")),
                    integer(device.at("slot_alignment")),
                    integer(device.at("workspace_bytes")),
                    integer(device.at("query_item_bytes")),
                    integer(device.at("key_item_bytes")),
                    integer(device.at("overlap_worth")),
                    integer(device.at("overlap_flop")),
                    integer(device.at("dispatch_flop")),
                    device.at("merges").get<bool>()};
  request.query = read_input(json.at("query"));
  request.key = read_input(json.at("key"));
  request.value = read_input(json.at("value"));
  request.output_layout = named(json.at("output_layout"), parse_layout);
  request.lse = json.at("lse").get<bool>();
  request.device_budget = integer(plan.at("memory").at("device").at("budget"));
  request.host_budget = integer(plan.at("memory").at("host").at("budget"));
  request.scratch = json.at("scratch").get<bool>();
  request.workers = integer(json.at("workers"));
  request.host_accumulators = json.at("host_accumulators").get<bool>();
  request.chunks = read_optional(json.at("chunks"));
  request.heads_per_group = read_optional(json.at("heads_per_group"));
  return request;
}

// The list of subproblems follows from the rest and may be far larger than memory: it is skipped.
Json parse_without_subproblems(std::istream& in) {
  const auto keep = [](int depth, Json::parse_event_t event, const Json& parsed) {
    return !(depth == 1 && event == Json::parse_event_t::key && parsed == subproblems_key);
  };
  return Json::parse(in, keep);
}

// Throws unless `json` says what `plan` is.
void require_equal(const Json& json, const Plan& plan) {
  std::stringstream text;
  write_json(plan, false, text);
  const Json expected = Json::parse(text);
  for (const auto& [key, value] : expected.items()) {
    if (json.at(key) != value) {
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

void write_json(const Plan& plan, bool subproblems, std::ostream& out) {
  out << "{\n\"version\": " << Plan::version;
  out << ",\n\"problem\": " << text_of(problem_json(plan.problem()));
  out << ",\n\"request\": " << text_of(request_json(plan.request));
  write_division(plan, out);
  out << ",\n\"order\": \"" << name_of(plan.order) << '"';
  out << ",\n\"accumulators\": " << text_of(accumulators_json(plan));
  out << ",\n\"memory\": " << text_of(memory_json(plan));
  out << ",\n\"subproblem_count\": " << plan.subproblem_count();
  if (subproblems) {
    out << ",\n\"" << subproblems_key << "\": [";
    for (std::int64_t id = 0; id < plan.subproblem_count(); ++id) {
      out << (id == 0 ? "\n" : ",\n");
      write_subproblem(plan, id, out);
    }
    out << "\n]";
  }
  out << "\n}\n";
}

Plan read_plan(std::istream& in, const std::string& name) {
  try {
    const Json json = parse_without_subproblems(in);
    if (integer(json.at("version")) != Plan::version) {
      throw InputError(
          fmt::format("version {} is not {}", text_of(json.at("version")), Plan::version));
    }
    Plan plan = make_plan(read_request(json));
    require_equal(json, plan);
    return plan;
  } catch (const InputError& error) {
    throw InputError(fmt::format("plan '{}': {}", name, error.what()));
  } catch (const nlohmann::json::exception& error) {
    throw InputError(fmt::format("plan '{}' is not a plan that `stream-cqsa plan --json` wrote: {}",
                                 name, error.what()));
  }
}

}  // namespace stream_cqsa
