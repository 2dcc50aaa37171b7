#include <fmt/format.h>

#include <iterator>

#include "core/counted.hpp"
#include "core/plan_sizes.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {
namespace {

class Table {
 public:
  template <typename... Args>
  void line(std::string_view label, fmt::format_string<Args...> text, Args&&... args) {
    fmt::format_to(std::back_inserter(text_), "{:<18}", label);
    fmt::format_to(std::back_inserter(text_), text, std::forward<Args>(args)...);
    text_ += '\n';
  }

  // A part of an arena; nothing where there is none of it.
  void part(std::string_view label, std::int64_t count, std::int64_t bytes) {
    if (count * bytes == 0) return;
    line("", "{:<18}{:>9} x {:>11} = {:>11}", label, count, format_bytes(bytes),
         format_bytes(count * bytes));
  }

  void total(std::int64_t bytes, std::int64_t budget) {
    line("", "{:<18}{:>9}   {:>11} = {:>11} of {} ({:.1f}%)", "planned", "", "",
         format_bytes(bytes), format_bytes(budget),
         100.0 * static_cast<double>(bytes) / static_cast<double>(budget));
  }

  std::string take() { return std::move(text_); }

 private:
  std::string text_;
};

std::string heads_text(const Problem& problem) {
  if (problem.query_heads == problem.kv_heads) return counted(problem.kv_heads, "head");
  return fmt::format("{} query and {}", problem.query_heads,
                     counted(problem.kv_heads, "key/value head"));
}

std::string cover_text(const DifferenceCover& cover) {
  if (cover.size() > 12) return "";
  return fmt::format(", cover {{{}}}", fmt::join(cover.residues, ", "));
}

std::string chunk_text(const Cut& cut) {
  if (cut.query_chunk_tokens == cut.key_chunk_tokens) {
    return "of up to " + counted(cut.query_chunk_tokens, "token");
  }
  return fmt::format("of up to {} query and {}", cut.query_chunk_tokens,
                     counted(cut.key_chunk_tokens, "key token"));
}

std::string bytes_text(double bytes) {
  return format_bytes(static_cast<std::int64_t>(std::min(bytes, 0x1p62)));
}

void write_problem(const Plan& plan, Table& table) {
  const Problem& problem = plan.problem();
  table.line("problem", "{}, {} of dimension {}, batch {}, {}{}", tokens_text(problem),
             heads_text(problem), problem.head_dim, problem.batch, name_of(problem.dtype),
             problem.mask == Mask::causal ? ", causal" : "");
  const double per_head =
      static_cast<double>(problem.live_scores({0, problem.query_length}, {0, problem.key_length}));
  const double scores =
      per_head * static_cast<double>(problem.batch) * static_cast<double>(problem.query_heads);
  table.line("work", "{:.4g} scores, {:.4g} TFLOP", scores,
             scores * 4e-12 * static_cast<double>(problem.head_dim));
}

void write_chunks(const Plan& plan, const Cut& cut, Table& table) {
  const std::int64_t k = cut.quorum_size;
  table.line("division", "c = {} {}, on multiples of {}", counted(cut.c, "chunk"), chunk_text(cut),
             cut.tile);
  table.line("", "k = {} per quorum ({:.3g}% of the sequence){}", counted(k, "chunk"),
             100.0 * static_cast<double>(k) / static_cast<double>(cut.c),
             cover_text(plan.division.cover()));
}

void write_tiles(const Cut& cut, Table& table) {
  table.line("division", "tiles, {} x {}", counted(cut.grid->rows, "row"),
             counted(cut.grid->columns, "column"));
  table.line("", "of up to {} and {}, on multiples of {}",
             counted(cut.query_chunk_tokens, "query token"),
             counted(cut.key_chunk_tokens, "key token"), cut.tile);
}

void write_division(const Plan& plan, const Cut& cut, Table& table) {
  if (cut.grid) {
    write_tiles(cut, table);
  } else {
    write_chunks(plan, cut, table);
  }
  table.line("head groups", "{} of up to {}, {}", cut.groups,
             counted(cut.group_heads, "key/value head"),
             counted(cut.group_heads * plan.problem().query_heads_per_kv_head(), "query head"));
  table.line("subproblems", "{} = {} batch x {} x {}", cut.subproblems, plan.problem().batch,
             counted(cut.groups, "head group"), counted(cut.quorums, cut.grid ? "tile" : "quorum"));
  const std::int64_t queries = std::min(cut.quorum_size, cut.query_chunks);
  const std::int64_t part = plan.device.queries_at_once(queries);
  if (part < queries) {
    table.line("", "each in parts of up to {}: the device has no room for a quorum's",
               counted(part, "query chunk"));
  }
  table.line("order", "{}",
             cut.grid ? "row by row, all tiles of a head group, then the next head group"
             : plan.order == ScheduleOrder::groups_outer
                 ? "all quorums of a head group, then the next head group"
                 : "all head groups of a quorum, then the next quorum");
}

void write_memory(const Plan& plan, Table& table) {
  const DeviceArena& device = plan.device;
  table.line("device memory", "{}{}{}", plan.request.device.kind,
             plan.request.device.name.empty() ? "" : ": ", plan.request.device.name);
  table.part("query slots", device.query_slots, device.query_slot_bytes);
  table.part("key/value slots", device.kv_slots, device.kv_slot_bytes);
  table.part("state slots", device.state_slots, device.state_slot_bytes);
  table.part("output slots", device.output_slots, device.output_slot_bytes);
  table.part("workspace", 1, device.workspace_bytes);
  table.total(device.bytes(), plan.request.device_budget);
  const HostArena& host = plan.host;
  table.line("host memory", "pieces of {}", counted(plan.piece_tokens, "query token"));
  table.part("cache blocks", host.cache_blocks, host.cache_block_bytes);
  table.part("state buffers", host.state_buffers, host.state_buffer_bytes);
  table.part("accumulators", host.accumulators, host.accumulator_bytes);
  table.part("output buffers", host.output_buffers, host.output_buffer_bytes);
  table.total(host.bytes(), plan.request.host_budget);
}

void write_movement(const Plan& plan, Table& table) {
  if (plan.placement == AccumulatorPlacement::device) {
    table.line("accumulators", "on the device");
  } else if (plan.placement == AccumulatorPlacement::memory) {
    table.line("accumulators", "in memory");
  } else {
    table.line("accumulators", "{} in memory, the others in a file of up to {}",
               plan.host.accumulators, format_bytes(plan.scratch_bytes));
  }
  const Traffic traffic = estimate_traffic(plan);
  table.line("moved, estimated", "{} read, {} to the device, {} of {} back",
             bytes_text(traffic.read), bytes_text(traffic.copied_in),
             bytes_text(traffic.copied_out),
             plan.placement == AccumulatorPlacement::device ? "finished rows" : "partials");
  table.line("", "{} written{}", bytes_text(traffic.written),
             traffic.spilled > 0
                 ? fmt::format(", {} to and from the scratch file", bytes_text(traffic.spilled))
                 : "");
}

}  // namespace

std::string describe(const Plan& plan) {
  const Cut cut = cut_of(plan);
  Table table;
  write_problem(plan, table);
  write_division(plan, cut, table);
  write_memory(plan, table);
  write_movement(plan, table);
  return table.take();
}

}  // namespace stream_cqsa
