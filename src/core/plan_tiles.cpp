#include "core/plan_tiles.hpp"

#include <algorithm>
#include <tuple>

#include "stream_cqsa/difference_cover.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa {
namespace {

// What a tile costs beside the bytes that it moves, in bytes that could be moved meanwhile: 20 us
// at 50 GB/s.
constexpr double launch_bytes = 1 << 20;
// How many times faster than the link to the device its own memory is, for states that are merged
// there, and how many times slower files are.
constexpr double merge_speed = 64;
constexpr double file_slowness = 4;

// 1, 2, 3, 4, 6, 8, 12, ... and `last`.
std::vector<std::int64_t> steps_to(std::int64_t last) {
  std::vector<std::int64_t> steps;
  for (std::int64_t power = 1; power < last; power *= 2) {
    steps.push_back(power);
    if (power > 1 && power / 2 * 3 < last) steps.push_back(power / 2 * 3);
  }
  steps.push_back(last);
  return steps;
}

// What is better comes first.
struct Rated {
  Cut cut;
  bool overlaps = false;      // one tile can be copied in while another computes
  bool enough = false;        // subproblems for the workers
  double cost = 0;            // bytes
  bool accumulating = false;  // on the device

  bool operator<(const Rated& other) const {
    return std::tuple(!overlaps, !enough, cost, cut.subproblems) <
           std::tuple(!other.overlaps, !other.enough, other.cost, other.cut.subproblems);
  }
};

// Bytes over the link to the device; those of files, of merges and of launches counted as the bytes
// that the link moves in that time. Where the device is worth overlapping, what nothing overlaps
// counts twice: the copies before the first tile, and behind the last row.
double cost_of(const PlanRequest& request, const Cut& cut, const DeviceArena& device,
               const HostLayout& host) {
  const Problem& problem = request.problem;
  const Traffic traffic = estimate_traffic(request, cut, ScheduleOrder::groups_outer, device, host);
  const double partials = partials_per_row(problem, cut);
  const double launches = static_cast<double>(problem.batch * cut.groups * cut.query_chunks);
  double cost = traffic.copied_in + traffic.copied_out +
                file_slowness * (traffic.read + traffic.spilled) +
                launch_bytes * launches * partials;
  if (host.placement == AccumulatorPlacement::device) {
    const double rows = static_cast<double>(problem.batch * problem.query_heads) *
                        static_cast<double>(problem.query_length);
    const double state = static_cast<double>(softmax_state_bytes(1, problem.head_dim));
    // Two are read, one is written.
    cost += 3 * rows * (partials - 1) * state / merge_speed;
  }
  if (request.device.overlap_flop > 0) {
    const std::int64_t output = cut.query_chunk_tokens * cut.group_heads *
                                problem.query_heads_per_kv_head() * problem.head_dim *
                                size_of(problem.output_dtype);
    cost += static_cast<double>(device.query_slot_bytes + device.kv_slot_bytes + output);
  }
  return cost;
}

// None where it does not fit the budgets.
std::optional<Rated> rate(const PlanRequest& request, const Cut& cut, std::int64_t least) {
  if (minimum_device_arena(request, cut).bytes() > request.device_budget) return std::nullopt;
  if (smallest_host_bytes(request, cut) > request.host_budget) return std::nullopt;
  const auto accumulating = accumulating_device_arena(request, cut);
  const DeviceArena device = accumulating ? *accumulating : device_arena(request, cut);
  const auto host = accumulating ? device_accumulators_layout(request, cut)
                                 : host_layout(request, cut, ScheduleOrder::groups_outer);
  if (!host) return std::nullopt;
  Rated rated;
  rated.cut = cut;
  rated.overlaps = preferred_device_arena(request, cut).bytes() <= request.device_budget;
  rated.enough = accumulating || cut.subproblems >= least;
  rated.accumulating = accumulating.has_value();
  rated.cost = cost_of(request, cut, device, *host);
  return rated;
}

// Around the best of the coarse grids: for more numbers of columns the fewest rows that are as good
// in all but the cost.
void refine(const PlanRequest& request, std::int64_t least, Rated& best) {
  const Grid around = *best.cut.grid;
  const std::int64_t groups = best.cut.groups;
  const std::int64_t longest = std::min(max_modulus, request.problem.key_length);
  constexpr std::int64_t parts = 16;
  const auto consider = [&](const Grid& grid) {
    if (grid.rows * grid.columns > most_tiles) return false;
    const auto rated = rate(request, cut_of(request, grid, groups), least);
    const bool as_good = rated && rated->overlaps >= best.overlaps &&
                         rated->enough >= best.enough && rated->accumulating >= best.accumulating;
    if (as_good && *rated < best) best = *rated;
    return as_good;
  };
  std::int64_t before = 0;
  for (std::int64_t part = 0; part <= parts; ++part) {
    // From half as many to twice as many.
    const std::int64_t columns =
        std::min(around.columns * (parts + 3 * part) / (2 * parts), longest);
    if (columns <= before) continue;
    before = columns;
    std::int64_t low = std::max<std::int64_t>(1, around.rows / 2), high = around.rows;
    while (low < high) {
      const std::int64_t rows = (low + high) / 2;
      if (consider({rows, columns})) {
        high = rows;
      } else {
        low = rows + 1;
      }
    }
    consider({low, columns});
  }
}

}  // namespace

std::vector<Grid> tile_grids(const PlanRequest& request) {
  if (request.grid) return {*request.grid};
  const Problem& problem = request.problem;
  std::vector<Grid> grids;
  for (const std::int64_t rows : steps_to(std::min(max_modulus, problem.query_length))) {
    for (const std::int64_t columns : steps_to(std::min(max_modulus, problem.key_length)))
      if (rows * columns <= most_tiles) grids.push_back({rows, columns});
  }
  return grids;
}

std::optional<Cut> choose_tiles(const PlanRequest& request,
                                std::span<const std::int64_t> group_counts, std::int64_t least) {
  std::optional<Rated> best;
  for (const std::int64_t groups : group_counts) {
    for (const Grid& grid : tile_grids(request)) {
      const auto rated = rate(request, cut_of(request, grid, groups), least);
      if (rated && (!best || *rated < *best)) best = rated;
    }
  }
  if (!best) return std::nullopt;
  if (!request.grid) refine(request, least, *best);
  return best->cut;
}

}  // namespace stream_cqsa
