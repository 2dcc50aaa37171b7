#include "core/plan_json.hpp"

#include <fmt/format.h>

#include <ostream>
#include <string>
#include <utility>

#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {
namespace {

using OrderedJson = nlohmann::ordered_json;  // in the order that people read

std::string_view name_of(Mask mask) { return mask == Mask::causal ? "causal" : "none"; }

OrderedJson problem_json(const Problem& problem) {
  return {{"batch", problem.batch},           {"query_heads", problem.query_heads},
          {"kv_heads", problem.kv_heads},     {"query_length", problem.query_length},
          {"key_length", problem.key_length}, {"head_dim", problem.head_dim},
          {"dtype", name_of(problem.dtype)},  {"output_dtype", name_of(problem.output_dtype)},
          {"mask", name_of(problem.mask)},    {"scale", problem.scale}};
}

OrderedJson rows_json(const Problem& problem) {
  return {{"queries_before", problem.queries_before}, {"queries_after", problem.queries_after}};
}

OrderedJson input_json(const InputTraits& input) {
  return {{"layout", name_of(input.layout)}, {"resident", input.resident}};
}

OrderedJson optional_json(const std::optional<std::int64_t>& value) {
  return value ? OrderedJson(*value) : OrderedJson(nullptr);
}

OrderedJson grid_json(const Grid& grid) { return OrderedJson::array({grid.rows, grid.columns}); }

OrderedJson traits_json(const DeviceTraits& device) {
  return {{"kind", device.kind},
          {"name", device.name},
          {"tile", device.tile},
          {"slot_alignment", device.slot_alignment},
          {"workspace_bytes", device.workspace_bytes},
          {"query_item_bytes", device.query_item_bytes},
          {"key_item_bytes", device.key_item_bytes},
          {"overlap_worth", device.overlap_worth},
          {"overlap_flop", device.overlap_flop},
          {"dispatch_flop", device.dispatch_flop},
          {"threads", device.threads},
          {"merges", device.merges}};
}

// What a plan follows from, besides the problem and the budgets.
OrderedJson request_json(const PlanRequest& request) {
  OrderedJson json = {{"device", traits_json(request.device)},
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
  if (request.scheme == Scheme::tiles) {
    json["grid"] = request.grid ? grid_json(*request.grid) : OrderedJson(nullptr);
  }
  if (request.mergers > 0) json["mergers"] = request.mergers;
  if (request.order) json["order"] = name_of(*request.order);
  return json;
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
std::string text_of(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

void write_cover(const Division& division, std::ostream& out) {
  const auto& residues = division.cover().residues;
  out << ",\n\"c\": " << division.chunk_count();
  out << ",\n\"cover\": ";
  write_list(out, division.quorum_size(), [&](std::int64_t i) { return residues[i]; });
  out << ",\n\"responsibilities\": ";
  write_list(out, division.chunk_count(), [&](std::int64_t d) {
    const Responsibility r = division.responsibilities()[d];
    return fmt::format("[{},{}]", residues[r.query], residues[r.key]);
  });
}

void write_division(const Plan& plan, std::ostream& out) {
  const Division& division = plan.division;
  const bool tiles = division.scheme() == Scheme::tiles;
  const auto range_text = [](Range range) {
    return fmt::format("[{},{}]", range.begin, range.end);
  };
  out << ",\n\"division\": \"" << name_of(division.scheme()) << '"';
  if (tiles) {
    out << ",\n\"grid\": " << grid_json(division.grid()).dump();
  } else {
    write_cover(division, out);
  }
  out << ",\n\"tile\": " << division.tile();
  const std::int64_t chunks = division.chunk_count();
  out << ",\n\"query_chunks\": ";
  write_list(out, tiles ? division.grid().rows : chunks,
             [&](std::int64_t i) { return range_text(division.chunk(i).queries); });
  out << ",\n\"key_chunks\": ";
  write_list(out, tiles ? division.grid().columns : chunks,
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

// What differs, as mismatch() says it; for messages.
class Differences {
 public:
  // The entries of two objects with the same keys; `prefix` is put before their names.
  void compare(std::string_view prefix, const OrderedJson& planned, const OrderedJson& given,
               std::string_view whose) {
    for (const auto& [key, value] : planned.items()) {
      if (value == given.at(key)) continue;
      text_ += fmt::format("{}for {}{} {}, {} {}", text_.empty() ? "" : "; ", prefix, key,
                           plain(value), owner(key, whose), plain(given.at(key)));
    }
  }
  std::string take() { return std::move(text_); }

 private:
  static std::string plain(const OrderedJson& value) {
    return value.is_string() ? value.get<std::string>() : value.dump();
  }
  // Some of a problem are options, not the input's.
  static std::string_view owner(std::string_view key, std::string_view whose) {
    return key == "mask" || key == "scale" || key == "output_dtype" ? "this run has" : whose;
  }

  std::string text_;
};

}  // namespace

std::string_view name_of(ScheduleOrder order) {
  return order == ScheduleOrder::groups_outer ? "groups_outer" : "groups_inner";
}

std::string_view name_of(AccumulatorPlacement placement) {
  return placement == AccumulatorPlacement::memory ? "memory"
         : placement == AccumulatorPlacement::file ? "file"
                                                   : "device";
}

void write_json(const Plan& plan, bool subproblems, std::ostream& out) {
  write_json(plan, OrderedJson::object(), subproblems, out);
}

void write_json(const Plan& plan, const OrderedJson& beside, bool subproblems, std::ostream& out) {
  OrderedJson problem = problem_json(plan.problem());
  if (plan.problem().sequence_length() > plan.problem().query_length) {
    problem.update(rows_json(plan.problem()));
  }
  out << "{\n\"version\": " << Plan::version;
  out << ",\n\"problem\": " << text_of(problem);
  out << ",\n\"request\": " << text_of(request_json(plan.request));
  write_division(plan, out);
  out << ",\n\"order\": \"" << name_of(plan.order) << '"';
  out << ",\n\"accumulators\": " << text_of(accumulators_json(plan));
  out << ",\n\"memory\": " << text_of(memory_json(plan));
  out << ",\n\"subproblem_count\": " << plan.subproblem_count();
  for (const auto& [key, value] : beside.items()) {
    out << ",\n\"" << key << "\": " << text_of(value);
  }
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

std::string to_json_text(const DeviceTraits& traits) { return traits_json(traits).dump(); }

std::string mismatch(const PlanRequest& planned, const PlanRequest& given) {
  Differences found;
  found.compare("", problem_json(planned.problem), problem_json(given.problem), "the input has");
  found.compare("", rows_json(planned.problem), rows_json(given.problem), "this run has");
  const auto device = [](const PlanRequest& request) {
    return OrderedJson{{"kind", request.device.kind}, {"tile", request.device.tile}};
  };
  found.compare("device ", device(planned), device(given), "this run has");
  found.compare("query ", input_json(planned.query), input_json(given.query), "the input has");
  found.compare("key ", input_json(planned.key), input_json(given.key), "the input has");
  found.compare("value ", input_json(planned.value), input_json(given.value), "the input has");
  const auto output = [](const PlanRequest& request) {
    return OrderedJson{{"output_layout", name_of(request.output_layout)}, {"lse", request.lse}};
  };
  found.compare("", output(planned), output(given), "this run has");
  return found.take();
}

}  // namespace stream_cqsa
