#include "core/plan_search.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "core/plan_tiles.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/difference_cover.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

// Calls visit(groups) for every number of head groups that the request leaves open, ascending. Of
// those with the same largest group only the smallest counts.
template <typename Visit>
void for_each_group_count(const PlanRequest& request, const Visit& visit) {
  const std::int64_t heads = request.problem.kv_heads;
  std::int64_t groups = ceil_div(heads, request.heads_per_group.value_or(heads));
  while (true) {
    visit(groups);
    const std::int64_t group_heads = ceil_div(heads, groups);
    if (request.heads_per_group || group_heads == 1) return;
    groups = ceil_div(heads, group_heads - 1);
  }
}

// Calls visit(cut) for every c and number of head groups that the request leaves open; by ascending
// c, until it returns false, for each number of groups.
template <typename Visit>
void for_each_cut(const PlanRequest& request, const Visit& visit) {
  const Problem& problem = request.problem;
  const std::int64_t longer = std::max(problem.query_length, problem.key_length);
  const std::int64_t first = request.chunks.value_or(1);
  const std::int64_t last = request.chunks.value_or(std::min(max_modulus, longer));
  for_each_group_count(request, [&](std::int64_t groups) {
    if (request.scheme == Scheme::tiles) {
      for (const Grid& grid : tile_grids(request)) {
        if (!visit(cut_of(request, grid, groups))) return;
      }
      return;
    }
    for (std::int64_t c = first; c <= last && visit(cut_of(request, c, groups));) ++c;
  });
}

// How many subproblems a run should have at least, for the sake of overlap.
std::int64_t overlap_subproblems(const PlanRequest& request) {
  if (request.device.overlap_flop == 0) return 1;
  const double most = static_cast<double>(request.device.overlap_worth);
  return static_cast<std::int64_t>(std::clamp(
      flop_of(request.problem) / static_cast<double>(request.device.overlap_flop), 1.0, most));
}

// How many it should have at least, for the sake of several workers: the last ones to end keep the
// others waiting for one subproblem at most.
std::int64_t shared_subproblems(const PlanRequest& request) {
  constexpr std::int64_t for_each_worker = 24;
  if (request.workers == 1) return 1;
  const double most = static_cast<double>(for_each_worker * request.workers);
  return static_cast<std::int64_t>(std::clamp(
      flop_of(request.problem) / static_cast<double>(request.device.dispatch_flop), 1.0, most));
}

struct Found {
  bool any = false;
  Cut cut;
  std::int64_t bytes = std::numeric_limits<std::int64_t>::max();
};

// The cut with the fewest `bytes(cut)` among those that `accept(cut)`, which is asked where it
// matters; ties to fewer subproblems.
template <typename Bytes, typename Accept>
Found smallest(const PlanRequest& request, const Bytes& bytes, const Accept& accept) {
  Found found;
  for_each_cut(request, [&](const Cut& cut) {
    const std::int64_t needed = bytes(cut);
    const bool better =
        needed < found.bytes || (needed == found.bytes && cut.subproblems < found.cut.subproblems);
    if (better && accept(cut)) found = {true, cut, needed};
    return true;
  });
  return found;
}

// With less device memory a cut cannot be computed, be it in parts.
std::int64_t smallest_device_bytes(const PlanRequest& request, const Cut& cut) {
  return smallest_device_arena(request, cut).bytes();
}

// The cut that needs least host memory among those with at most `device_budget`.
Found smallest_host(const PlanRequest& request, std::int64_t device_budget) {
  constexpr std::int64_t none = std::numeric_limits<std::int64_t>::max();
  return smallest(
      request,
      [&](const Cut& cut) {
        const bool fits = smallest_device_bytes(request, cut) <= device_budget;
        return fits ? smallest_host_bytes(request, cut) : none;
      },
      [](const Cut&) { return true; });
}

std::string division_text(const Cut& cut) {
  const std::string division =
      cut.grid ? fmt::format("a grid of {}x{} tiles", cut.grid->rows, cut.grid->columns)
               : fmt::format("c = {}", cut.c);
  return fmt::format("{}, {} key/value head{} per group", division, cut.group_heads,
                     cut.group_heads == 1 ? "" : "s");
}

std::string exact(std::int64_t bytes) {
  return bytes < 1024 ? format_bytes(bytes)
                      : fmt::format("{} ({} bytes)", format_bytes(bytes), bytes);
}

// What would make a smaller host budget work.
std::string scratch_hint(const PlanRequest& request, const Cut& cut, std::int64_t host_bytes) {
  if (request.scratch) return "";
  PlanRequest with_scratch = request;
  with_scratch.scratch = true;
  const std::int64_t bytes = smallest_host_bytes(with_scratch, cut);
  if (bytes >= host_bytes) return "";
  return fmt::format("; with --scratch {} would do", exact(bytes));
}

// The cut of the smallest device budget that works with the request's host budget.
Found smallest_device(const PlanRequest& request) {
  return smallest(
      request, [&](const Cut& cut) { return smallest_device_bytes(request, cut); },
      [&](const Cut& cut) { return smallest_host_bytes(request, cut) <= request.host_budget; });
}

// What would make a smaller device budget work: divisions whose accumulators only a disk can hold.
std::string scratch_hint(const PlanRequest& request, std::int64_t device_bytes) {
  if (request.scratch) return "";
  PlanRequest with_scratch = request;
  with_scratch.scratch = true;
  const Found device = smallest_device(with_scratch);
  return device.bytes < device_bytes
             ? fmt::format("; with --scratch {} would do", exact(device.bytes))
             : "";
}

// A budget, to the byte where what is needed would look the same.
std::string given(std::int64_t budget, std::int64_t needed) {
  return format_bytes(budget) == format_bytes(needed) ? exact(budget) : format_bytes(budget);
}

[[noreturn]] void throw_too_small(const PlanRequest& request) {
  const Found device = smallest_device(request);
  const Found host = smallest_host(request, request.device_budget);
  if (device.any && host.any) {
    throw InputError(fmt::format(
        "device memory {} and host memory {} are too small together: with that host memory the "
        "smallest device budget that works for this problem is {}, with that device memory the "
        "smallest host budget is {}{}",
        given(request.device_budget, device.bytes), given(request.host_budget, host.bytes),
        exact(device.bytes), exact(host.bytes), scratch_hint(request, host.cut, host.bytes)));
  }
  if (device.any) {
    throw InputError(
        fmt::format("device memory {} is too small: the smallest budget that works for this "
                    "problem is {}, with {}{}",
                    given(request.device_budget, device.bytes), exact(device.bytes),
                    division_text(device.cut), scratch_hint(request, device.bytes)));
  }
  if (host.any) {
    throw InputError(fmt::format(
        "host memory {} is too small: the smallest budget that works for this problem is {}, "
        "with {}{}",
        given(request.host_budget, host.bytes), exact(host.bytes), division_text(host.cut),
        scratch_hint(request, host.cut, host.bytes)));
  }
  const Found least = smallest(
      request, [&](const Cut& cut) { return smallest_device_bytes(request, cut); },
      [](const Cut&) { return true; });
  const Found both = smallest_host(request, least.bytes);
  throw InputError(fmt::format(
      "device memory {} and host memory {} are both too small: the smallest device budget that "
      "works for this problem is {}, with a host budget of {}, {}{}",
      format_bytes(request.device_budget), format_bytes(request.host_budget), exact(least.bytes),
      exact(both.bytes), division_text(both.cut), scratch_hint(request, both.cut, both.bytes)));
}

bool fits(const PlanRequest& request, const Cut& cut, const DeviceArena& device) {
  return device.bytes() <= request.device_budget &&
         smallest_host_bytes(request, cut) <= request.host_budget;
}

// Whether this cut would be an improvement is asked first: it is cheaper than whether it fits.
// Where it is none, a larger c with as many head groups is none either.
bool better(const Cut& cut, const std::optional<Cut>& found) {
  const auto rank = [](const Cut& of) { return std::pair(of.subproblems, of.c); };
  return !found || rank(cut) < rank(*found);
}

// The fewest subproblems with which `arena(request, cut)` fits; none where nothing does.
template <typename Arena>
std::optional<Cut> find_fewest(const PlanRequest& request, const Arena& arena) {
  std::optional<Cut> fewest;
  for_each_cut(request, [&](const Cut& cut) {
    if (!better(cut, fewest)) return false;
    if (fits(request, cut, arena(request, cut))) fewest = cut;
    return true;
  });
  return fewest;
}

// The cut that choose_cut() promises for one worker, or several that share the subproblems of each
// head group; none where no quorum fits.
std::optional<Cut> find_cut(const PlanRequest& request) {
  const std::optional<Cut> fewest = find_fewest(request, minimum_device_arena);
  if (!fewest) return std::nullopt;

  // A second pass, as what may replace the fewest depends on them.
  std::optional<Cut> overlapped;
  const std::int64_t shared = shared_subproblems(request);
  const std::int64_t least = std::max(overlap_subproblems(request), shared);
  const std::int64_t most =
      std::max(request.device.overlap_worth * fewest->subproblems, 2 * shared);
  for_each_cut(request, [&](const Cut& cut) {
    if (cut.subproblems > most || !better(cut, overlapped)) return false;
    if (cut.subproblems < least || cut.tile < fewest->tile) return true;
    if (fits(request, cut, preferred_device_arena(request, cut))) overlapped = cut;
    return true;
  });
  return overlapped ? overlapped : fewest;
}

// The cut for workers of which each takes whole head groups, if there is one: of few head groups,
// but several for each worker where the heads allow it, so that one's rows are written while the
// next one is computed.
std::optional<Cut> find_cut_by_groups(const PlanRequest& request) {
  if (request.workers == 1 || !request.device.merges || request.host_accumulators)
    return std::nullopt;
  PlanRequest alone = request;
  alone.workers = 1;
  constexpr std::int64_t several = 4;
  std::optional<Cut> chosen;
  const auto enough = [&] {
    return chosen && request.problem.batch * chosen->groups >= several * request.workers;
  };
  for_each_group_count(request, [&](std::int64_t groups) {
    if (enough() || !shares_by_groups(request, groups)) return;
    alone.heads_per_group = ceil_div(request.problem.kv_heads, groups);
    const auto cut = find_cut(alone);
    if (cut && accumulating_device_arena(request, *cut)) chosen = cut;
  });
  return chosen;
}

}  // namespace

std::vector<std::int64_t> group_counts(const PlanRequest& request) {
  std::vector<std::int64_t> counts;
  for_each_group_count(request, [&](std::int64_t groups) { counts.push_back(groups); });
  return counts;
}

double flop_of(const Problem& problem) {
  const std::int64_t scores =
      problem.live_scores({0, problem.query_length}, {0, problem.key_length});
  return 4.0 * static_cast<double>(scores) * static_cast<double>(problem.head_dim) *
         static_cast<double>(problem.query_heads * problem.batch);
}

Cut choose_cut(const PlanRequest& request) {
  if (request.scheme == Scheme::tiles) {
    const auto cut = choose_tiles(request, group_counts(request), shared_subproblems(request));
    if (!cut) throw_too_small(request);
    return *cut;
  }
  if (const auto cut = find_cut_by_groups(request)) return *cut;
  if (const auto cut = find_cut(request)) return *cut;
  if (const auto cut = find_fewest(request, smallest_device_arena)) return *cut;
  throw_too_small(request);
}

std::int64_t smallest_device_budget(const PlanRequest& request) {
  const Found device = smallest_device(request);
  if (!device.any) throw_too_small(request);
  return device.bytes;
}

std::int64_t smallest_host_budget(const PlanRequest& request) {
  const Found host = smallest_host(request, request.device_budget);
  if (!host.any) throw_too_small(request);
  return host.bytes;
}

}  // namespace stream_cqsa
