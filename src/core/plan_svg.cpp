#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <ostream>
#include <span>
#include <utility>
#include <vector>

#include "core/counted.hpp"
#include "core/place_text.hpp"
#include "core/svg.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {
namespace {

constexpr double page_width = 1160;
constexpr double page_height = 760;
constexpr double matrix_x = 84;
constexpr double matrix_y = 132;
constexpr double matrix_size = 560;
constexpr double panel_x = 712;
constexpr double panel_width = 392;
// Up to here every pair of every quorum is drawn; beyond, on a grid of 280 cells, three quorums, or
// of tiles the live area alone.
constexpr std::int64_t most_drawn = 200;
constexpr std::int64_t coarse_cells = 280;
constexpr std::int64_t most_numbered = 16;

constexpr std::string_view ink = "#1f2933";
constexpr std::string_view muted = "#627080";
constexpr std::string_view pale = "#e6ebf0";
constexpr std::string_view frame = "#aab6c2";
constexpr std::array<std::string_view, 5> part_colours = {"#3b6ea8", "#5fa3a3", "#d99a4e",
                                                          "#9a86b8", "#b5655a"};

constexpr TextStyle title_style{22, ink, Anchor::start, true};
constexpr TextStyle heading_style{15, ink, Anchor::start, true};
constexpr TextStyle body_style{13, ink};
constexpr TextStyle amount_style{13, ink, Anchor::end};
constexpr TextStyle caption_style{13, muted};
constexpr TextStyle tick_style{12, muted, Anchor::middle};

bool has_tiles(const Plan& plan) { return plan.division.scheme() == Scheme::tiles; }

// Few quorums go evenly round the colour wheel; many by the golden angle, which keeps neighbouring
// ones apart, in three lightnesses.
std::string colour_of(std::int64_t quorum, std::int64_t count) {
  const double step = count <= 12 ? 360.0 / static_cast<double>(count) : 137.50776;
  const double hue = std::fmod(212.0 + step * static_cast<double>(quorum), 360.0);
  // Yellows and greens look lighter than they are, and white text must stand out on all.
  const double shade = hue > 40.0 && hue < 190.0 ? 0.10 : 0.0;
  constexpr std::array<double, 3> lightness = {0.52, 0.68, 0.60};
  if (count <= 12) return rgb(hue, 0.48, 0.55 - shade);
  return rgb(hue, 0.52, lightness[static_cast<std::size_t>(quorum % 3)] - shade);
}

// Where cell `index` of `count` begins along the matrix.
double offset_of(std::int64_t index, std::int64_t count) {
  return matrix_size * static_cast<double>(index) / static_cast<double>(count);
}

// Query chunks times key chunks of the matrix.
Grid grid_of(const Plan& plan) {
  const std::int64_t c = plan.division.chunk_count();
  return has_tiles(plan) ? plan.division.grid() : Grid{c, c};
}

std::int64_t longer_side(const Grid& grid) { return std::max(grid.rows, grid.columns); }

// Cells of a grid over the matrix, drawn as one path.
class Cells {
 public:
  explicit Cells(const Grid& grid) : grid_(grid) {}

  // `length` cells of a row.
  void add(std::int64_t row, std::int64_t column, std::int64_t length = 1) {
    fmt::format_to(std::back_inserter(path_), "M{} {}h{}v1h-{}z", column, row, length, length);
  }

  void draw(Svg& svg, std::string_view fill) const {
    svg.path(fmt::format("transform=\"translate({} {}) scale({:.6f} {:.6f})\" fill=\"{}\" "
                         "shape-rendering=\"crispEdges\"",
                         matrix_x, matrix_y, offset_of(1, grid_.columns), offset_of(1, grid_.rows),
                         fill),
             path_);
  }

 private:
  Grid grid_;
  std::string path_;
};

bool is_live(const Plan& plan, std::int64_t p, std::int64_t q) {
  return plan.problem().liveness(plan.division.chunk(p).queries, plan.division.chunk(q).keys) !=
         Liveness::dead;
}

// In pixels: a pattern in a scaled grid would be scaled with it.
void draw_partial(Svg& svg, const std::vector<std::pair<std::int64_t, std::int64_t>>& pairs,
                  const Grid& grid) {
  std::string path;
  const double width = offset_of(1, grid.columns), height = offset_of(1, grid.rows);
  for (const auto& [p, q] : pairs) {
    fmt::format_to(std::back_inserter(path), "M{:.2f} {:.2f}h{:.2f}v{:.2f}h-{:.2f}z",
                   matrix_x + offset_of(q, grid.columns), matrix_y + offset_of(p, grid.rows), width,
                   height, width);
  }
  svg.path(fmt::format("fill=\"{}\"", Svg::hatch), path);
}

// White lines between cells that are large enough to tell apart.
void draw_grid(Svg& svg, const Grid& grid) {
  if (longer_side(grid) > 64) return;
  std::string path;
  for (std::int64_t i = 1; i < grid.columns; ++i) {
    fmt::format_to(std::back_inserter(path), "M{:.2f} {}v{}", matrix_x + offset_of(i, grid.columns),
                   matrix_y, matrix_size);
  }
  for (std::int64_t i = 1; i < grid.rows; ++i) {
    fmt::format_to(std::back_inserter(path), "M{} {:.2f}h{}", matrix_x,
                   matrix_y + offset_of(i, grid.rows), matrix_size);
  }
  svg.path(
      fmt::format("stroke=\"white\" stroke-width=\"{}\"", longer_side(grid) <= 32 ? 1.5 : 0.75),
      path);
}

void draw_numbers(Svg& svg, const Plan& plan) {
  const Grid grid = grid_of(plan);
  if (longer_side(grid) > most_numbered) return;
  for (std::int64_t p = 0; p < grid.rows; ++p) {
    for (std::int64_t q = 0; q < grid.columns; ++q) {
      if (!is_live(plan, p, q)) continue;
      svg.text(matrix_x + offset_of(2 * q + 1, 2 * grid.columns),
               matrix_y + offset_of(2 * p + 1, 2 * grid.rows) + 5,
               {15, "white", Anchor::middle, true}, fmt::format("{}", plan.division.owner(p, q)));
    }
  }
}

void draw_every_quorum(Svg& svg, const Plan& plan) {
  const Grid grid = grid_of(plan);
  // Tiles have the colour of their row, whose accumulators are open together.
  const std::int64_t quorums_alike = has_tiles(plan) ? grid.columns : 1;
  std::vector<std::pair<std::int64_t, std::int64_t>> partial;
  for (std::int64_t colour = 0; colour < grid.rows; ++colour) {
    Cells cells(grid);
    for (std::int64_t i = 0; i < quorums_alike; ++i) {
      const QuorumWork work = plan.division.work(colour * quorums_alike + i);
      for (const ChunkPair& pair : work.pairs) {
        const std::int64_t p = work.chunks[pair.query].index;
        const std::int64_t q = work.chunks[pair.key].index;
        cells.add(p, q);
        if (pair.liveness == Liveness::partial) partial.emplace_back(p, q);
      }
    }
    cells.draw(svg, colour_of(colour, grid.rows));
  }
  draw_partial(svg, partial, grid);
  draw_grid(svg, grid);
  draw_numbers(svg, plan);
}

// Whether pairs are live, sampled on the coarse grid, in pale grey.
void draw_live_area(Svg& svg, const Plan& plan) {
  const auto [rows, columns] = grid_of(plan);
  const auto chunk_at = [](std::int64_t cell, std::int64_t chunks) {
    return (2 * cell + 1) * chunks / (2 * coarse_cells);
  };
  Cells cells({coarse_cells, coarse_cells});
  for (std::int64_t row = 0; row < coarse_cells; ++row) {
    std::int64_t begin = 0;
    for (std::int64_t column = 0; column <= coarse_cells; ++column) {
      if (column < coarse_cells && is_live(plan, chunk_at(row, rows), chunk_at(column, columns)))
        continue;
      if (column > begin) cells.add(row, begin, column - begin);
      begin = column + 1;
    }
  }
  cells.draw(svg, pale);
}

std::array<std::int64_t, 3> sampled_quorums(std::int64_t c) { return {0, c / 3, 2 * c / 3}; }

void draw_sampled_quorums(Svg& svg, const Plan& plan) {
  const std::int64_t c = plan.division.chunk_count();
  draw_live_area(svg, plan);
  if (has_tiles(plan)) return;
  std::int64_t index = 0;
  for (const std::int64_t quorum : sampled_quorums(c)) {
    const QuorumWork work = plan.division.work(quorum);
    std::vector<std::pair<std::int64_t, std::int64_t>> marked;
    for (const ChunkPair& pair : work.pairs) {
      marked.emplace_back(work.chunks[pair.query].index * coarse_cells / c,
                          work.chunks[pair.key].index * coarse_cells / c);
    }
    std::sort(marked.begin(), marked.end());
    marked.erase(std::unique(marked.begin(), marked.end()), marked.end());
    Cells cells({coarse_cells, coarse_cells});
    for (const auto& [row, column] : marked) cells.add(row, column);
    cells.draw(svg, colour_of(index++, 3));
  }
}

void draw_axes(Svg& svg, const Plan& plan) {
  const auto [rows, columns] = grid_of(plan);
  svg.rect(matrix_x, matrix_y, matrix_size, matrix_size, "none", frame);
  svg.text(matrix_x + matrix_size / 2, matrix_y - 32, {14, ink, Anchor::middle}, "key chunk");
  svg.text(matrix_x - 46, matrix_y + matrix_size / 2, {14, ink, Anchor::middle, false, true},
           "query chunk");
  // Calls draw(position, label) for each tick of an axis of so many chunks.
  const auto ticks = [](std::int64_t chunks, const auto& draw) {
    const std::int64_t steps =
        std::min<std::int64_t>(chunks - 1, chunks <= most_numbered ? chunks - 1 : 4);
    for (std::int64_t i = 0; i <= steps; ++i) {
      const std::int64_t chunk = steps == 0 ? 0 : i * (chunks - 1) / steps;
      draw(offset_of(2 * chunk + 1, 2 * chunks), fmt::format("{}", chunk));
    }
  };
  ticks(columns, [&](double at, const std::string& label) {
    svg.text(matrix_x + at, matrix_y - 10, tick_style, label);
  });
  ticks(rows, [&](double at, const std::string& label) {
    svg.text(matrix_x - 10, matrix_y + at + 4, {12, muted, Anchor::end}, label);
  });
}

std::string matrix_caption(const Plan& plan) {
  const std::int64_t c = longer_side(grid_of(plan));
  if (has_tiles(plan)) {
    if (c > most_drawn)
      return fmt::format("Live pairs are grey, on a grid of {} cells.", coarse_cells);
    return c <= most_numbered ? "Each number is a tile, each colour a row of them."
                              : "Each cell is a tile, each colour a row of them.";
  }
  if (c <= most_numbered)
    return "Each number and colour is a quorum: the one that computes the pair.";
  if (c <= most_drawn) return "Each colour is a quorum: the one that computes the pair.";
  const auto [first, second, third] = sampled_quorums(c);
  return fmt::format(
      "Drawn: quorums {}, {} and {} of {}, on a grid of {} cells; other live pairs are grey.",
      first, second, third, c, coarse_cells);
}

void draw_legend(Svg& svg, const Plan& plan) {
  const std::int64_t c = longer_side(grid_of(plan));
  const double y = matrix_y + matrix_size + 24;
  svg.text(matrix_x, y, caption_style, matrix_caption(plan));
  double x = matrix_x;
  const auto entry = [&](std::string_view fill, bool hatched, std::string_view label) {
    svg.rect(x, y + 14, 14, 14, fill, frame);
    if (hatched) svg.rect(x, y + 14, 14, 14, Svg::hatch);
    svg.text(x + 21, y + 26, caption_style, label);
    x += 40 + 6.6 * static_cast<double>(label.size());
  };
  const std::string_view live = c <= most_drawn ? "#5b84b1" : pale;
  entry(live, false, c <= most_drawn ? "full: no masking" : "live");
  if (plan.problem().mask != Mask::none && c <= most_drawn) {
    entry(live, true, "partial: masked inside");
  }
  entry("white", false, "blank: dead, never computed");
}

struct Part {
  std::string_view name;
  std::int64_t count;
  std::int64_t bytes_each;
};

// A bar as long as the budget, filled by the parts of the arena, and the list of them below.
double draw_memory(Svg& svg, double y, std::string_view title, std::span<const Part> parts,
                   std::int64_t planned, std::int64_t budget) {
  svg.text(panel_x, y, heading_style, title);
  svg.text(panel_x + panel_width, y, amount_style,
           fmt::format("{} planned of {}", format_bytes(planned), format_bytes(budget)));
  const double scale = panel_width / static_cast<double>(budget);
  svg.rect(panel_x, y + 12, panel_width, 26, "#f5f7f9");
  double x = panel_x;
  double line = y + 62;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const std::int64_t bytes = parts[i].count * parts[i].bytes_each;
    if (bytes == 0) continue;
    const double length = scale * static_cast<double>(bytes);
    svg.rect(x, y + 12, length, 26, part_colours[i]);
    x += length;
    svg.rect(panel_x, line - 11, 12, 12, part_colours[i]);
    svg.text(panel_x + 20, line, body_style, parts[i].name);
    svg.text(panel_x + 270, line, {13, muted, Anchor::end},
             fmt::format("{} x {}", parts[i].count, format_bytes(parts[i].bytes_each)));
    svg.text(panel_x + panel_width, line, amount_style, format_bytes(bytes));
    line += 22;
  }
  svg.rect(panel_x, y + 12, panel_width, 26, "none", frame);
  return line;
}

void draw_panel(Svg& svg, const Plan& plan) {
  const DeviceArena& device = plan.device;
  const std::array<Part, 5> device_parts = {
      {{"query slots", device.query_slots, device.query_slot_bytes},
       {"key/value slots", device.kv_slots, device.kv_slot_bytes},
       {"state slots", device.state_slots, device.state_slot_bytes},
       {"workspace", 1, device.workspace_bytes},
       {"output slots", device.output_slots, device.output_slot_bytes}}};
  double y = draw_memory(svg, matrix_y + 12, "device memory", device_parts, device.bytes(),
                         plan.request.device_budget);
  const HostArena& host = plan.host;
  const std::array<Part, 4> host_parts = {
      {{"cache blocks", host.cache_blocks, host.cache_block_bytes},
       {"state buffers", host.state_buffers, host.state_buffer_bytes},
       {"accumulators", host.accumulators, host.accumulator_bytes},
       {"output buffers", host.output_buffers, host.output_buffer_bytes}}};
  y = draw_memory(svg, y + 34, "host memory", host_parts, host.bytes(), plan.request.host_budget);
  y += 34;
  const auto fact = [&](std::string_view label, std::string_view value) {
    svg.text(panel_x, y, caption_style, label);
    svg.text(panel_x + panel_width, y, amount_style, value);
    y += 24;
  };
  svg.text(panel_x, y, heading_style, "schedule");
  y += 28;
  fact("subproblems", fmt::format("{}", plan.subproblem_count()));
  fact(has_tiles(plan) ? "batch x head groups x tiles" : "batch x head groups x quorums",
       fmt::format("{} x {} x {}", plan.problem().batch, plan.groups.size(),
                   plan.division.quorum_count()));
  fact("order", has_tiles(plan)                             ? "head groups, then rows, then columns"
                : plan.order == ScheduleOrder::groups_outer ? "head groups, then quorums"
                                                            : "quorums, then head groups");
  fact("accumulators", fmt::format("{}{}", place_text(plan.placement),
                                   plan.placement == AccumulatorPlacement::file
                                       ? " of up to " + format_bytes(plan.scratch_bytes)
                                       : ""));
}

std::string division_text(const Plan& plan) {
  const Division& division = plan.division;
  if (has_tiles(plan)) {
    return fmt::format("{} x {} of tiles.", counted(division.grid().rows, "row"),
                       counted(division.grid().columns, "column"));
  }
  const std::int64_t c = division.chunk_count();
  const std::int64_t k = division.quorum_size();
  return fmt::format("c = {}; each quorum holds k = {} of them ({:.3g}%).", counted(c, "chunk"), k,
                     100.0 * static_cast<double>(k) / static_cast<double>(c));
}

void draw_title(Svg& svg, const Plan& plan) {
  const Problem& problem = plan.problem();
  svg.text(
      40, 46, title_style,
      has_tiles(plan) ? "Attention divided into tiles" : "Attention divided by cyclic quorum sets");
  svg.text(40, 70, {14, muted},
           fmt::format("{}, {}, dimension {}, {}{}. {}", tokens_text(problem),
                       counted(problem.query_heads, "query head"), problem.head_dim,
                       name_of(problem.dtype), problem.mask == Mask::causal ? ", causal" : "",
                       division_text(plan)));
}

}  // namespace

void write_svg(const Plan& plan, std::ostream& out) {
  Svg svg(out, page_width, page_height);
  draw_title(svg, plan);
  if (longer_side(grid_of(plan)) <= most_drawn) {
    draw_every_quorum(svg, plan);
  } else {
    draw_sampled_quorums(svg, plan);
  }
  draw_axes(svg, plan);
  draw_legend(svg, plan);
  draw_panel(svg, plan);
  svg.end();
}

}  // namespace stream_cqsa
