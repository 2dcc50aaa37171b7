#include "core/plan_candidates.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <utility>

#include "core/plan_search.hpp"
#include "core/plan_tiles.hpp"
#include "stream_cqsa/difference_cover.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa {
namespace {

// Times the least estimate: what no prediction makes good.
constexpr double hopeless = 2;

// At most `most_group_counts` of those that are open, in about equal ratios.
std::vector<std::int64_t> some_group_counts(const PlanRequest& request) {
  constexpr std::size_t most_group_counts = 8;
  const std::vector<std::int64_t> all = group_counts(request);
  if (all.size() <= most_group_counts) return all;
  const double ratio = std::pow(static_cast<double>(all.back()) / static_cast<double>(all.front()),
                                1.0 / static_cast<double>(most_group_counts - 1));
  std::vector<std::int64_t> some = {all.front()};
  for (const std::int64_t count : all) {
    if (static_cast<double>(count) >= ratio * static_cast<double>(some.back())) {
      some.push_back(count);
    }
  }
  if (some.back() != all.back()) some.back() = all.back();
  return some;
}

// Two, and perfect covers, k(k - 1) + 1 chunks: of about as many chunks they are those of which a
// subproblem holds the smallest part. Each at least 1.3 times the one before.
std::vector<std::int64_t> chunk_counts(const PlanRequest& request) {
  constexpr double least_ratio = 1.3;
  if (request.chunks) return {*request.chunks};
  const std::int64_t longest = std::max(request.problem.query_length, request.problem.key_length);
  std::vector<std::int64_t> counts = {1};
  if (longest >= 2) counts.push_back(2);
  for (std::int64_t k = 2; k * (k - 1) + 1 <= std::min(max_modulus, longest); ++k) {
    const std::int64_t c = k * (k - 1) + 1;
    const bool apart = static_cast<double>(c) >= least_ratio * static_cast<double>(counts.back());
    if (apart && difference_cover_size(c) == k) counts.push_back(c);
  }
  return counts;
}

// Where chunks are empty quorums differ, and of so many predict() looks at some.
bool is_sampled(const Cut& cut) {
  constexpr std::int64_t examined = 256;
  return !cut.grid && cut.c > examined && std::min(cut.query_chunks, cut.key_chunks) < cut.c;
}

// Of what the request leaves open, cuts on whole kernel tiles: how much slower the kernel is on
// smaller ones is not predicted.
std::vector<Cut> cuts_of(const PlanRequest& request) {
  std::vector<Cut> cuts;
  const bool pinned = request.chunks || request.grid;
  const auto add = [&](const Cut& cut) {
    if (pinned || (cut.tile == request.device.tile && !is_sampled(cut))) cuts.push_back(cut);
  };
  for (const std::int64_t groups : some_group_counts(request)) {
    if (request.scheme == Scheme::tiles) {
      for (const Grid& grid : tile_grids(request)) add(cut_of(request, grid, groups));
    } else {
      for (const std::int64_t c : chunk_counts(request)) add(cut_of(request, c, groups));
    }
  }
  return cuts;
}

// The arenas of a cut.
struct Arenas {
  DeviceArena device;
  HostLayout host;
};

bool may_be(const ScheduleForm& form, const PlanRequest& request, const Cut& cut) {
  if (!cut.has_orders()) return form.order == ScheduleOrder::groups_outer;
  return !request.order || *request.order == form.order;
}

// None where it does not fit the budgets.
std::optional<Arenas> arenas_of(const PlanRequest& request, const Cut& cut,
                                const ScheduleForm& form) {
  if (form.on_device) {
    const auto device = accumulating_device_arena(request, cut);
    const auto host = device ? device_accumulators_layout(request, cut) : std::nullopt;
    return host ? std::optional(Arenas{*device, *host}) : std::nullopt;
  }
  const auto host = host_layout(request, cut, form.order);
  return host ? std::optional(Arenas{device_arena(request, cut), *host}) : std::nullopt;
}

// Bytes of vectors of so many tokens and heads, in device memory.
double vector_bytes(const Problem& problem, double tokens, std::int64_t heads) {
  return tokens *
         static_cast<double>(heads * problem.head_dim * size_of(storage_type(problem.dtype)));
}

double launches_of(const Problem& problem, const Cut& cut) {
  if (!cut.grid) return static_cast<double>(cut.subproblems);
  // Dead tiles are not launched.
  const auto rows = static_cast<double>(problem.batch * cut.groups * cut.query_chunks);
  return rows * partials_per_row(problem, cut);
}

class Estimate {
 public:
  Estimate(const PlanRequest& request, const Cut& cut, const ScheduleForm& form,
           const Arenas& arenas, const Costs& costs, InputKind inputs)
      : request_(request),
        problem_(request.problem),
        cut_(cut),
        costs_(costs),
        accumulating_(form.on_device),
        sweeps_(problem_.batch *
                (form.order == ScheduleOrder::groups_outer ? cut.groups : std::int64_t{1})),
        read_rate_(read_rate(costs, inputs)),
        workers_(static_cast<double>(request.workers)),
        copying_workers_(copying_workers(arenas.host.arena)),
        traffic_(estimate_traffic(request, cut, form.order, arenas.device, arenas.host)) {}

  double seconds() const {
    const double compute = compute_seconds();
    const double of_sweep = compute / static_cast<double>(sweeps_);
    const double reads = traffic_.read / read_rate_;
    const double in = std::max(first_load(), overhang(first_reads(), of_sweep));
    const double launched = compute * workers_ / static_cast<double>(cut_.subproblems);
    const double tail =
        std::max(last_delivery(),
                 overhang(last_writes(), std::max(of_sweep, reads / static_cast<double>(sweeps_))));
    const double back = traffic_.copied_out;
    double behind = std::max(back / costs_.copy_out / copying_workers_, write_seconds());
    if (!accumulating_) behind = std::max(behind, back / costs_.merge);
    if (request_.workers > 1) behind = std::max(behind, back / costs_.receive);
    const double before = std::max(reads, traffic_.copied_in / costs_.copy_in / workers_);
    return costs_.start_seconds +
           std::max({before + launched + tail, in + compute + tail, in + launched + behind});
  }

 private:
  // How many copy out at once: with few buffers behind them they wait for each other.
  double copying_workers(const HostArena& host) const {
    const auto buffers = static_cast<double>(host.state_buffers * host.state_buffer_bytes);
    return accumulating_ || buffers > workers_ * last_rows() * state_bytes() ? workers_ : 1.0;
  }

  // Until the first subproblem's chunks are there.
  double first_load() const {
    const std::int64_t keys = std::min(cut_.quorum_size, cut_.key_chunks) * cut_.key_chunk_tokens;
    const std::int64_t queries = cut_.queries_of_quorum() * cut_.query_chunk_tokens;
    const std::int64_t query_heads = cut_.group_heads * problem_.query_heads_per_kv_head();
    return load_seconds(request_.query, queries, query_heads) +
           load_seconds(request_.key, keys, cut_.group_heads) +
           load_seconds(request_.value, keys, cut_.group_heads);
  }
  double load_seconds(const InputTraits& input, std::int64_t tokens, std::int64_t heads) const {
    const double rate = input.resident ? costs_.copy_in : std::min(read_rate_, costs_.copy_in);
    return vector_bytes(problem_, static_cast<double>(tokens), heads) / rate;
  }

  double compute_seconds() const {
    const double launches = launches_of(problem_, cut_);
    const double kernels = kernel_seconds(kernel_cost(costs_, problem_),
                                          flop_of(problem_) / workers_, launches / workers_);
    if (!accumulating_ || cut_.partials == 1) return kernels;
    const double states = rows() * partials() * state_bytes();
    return kernels + states / costs_.device_merge / workers_;
  }

  // Of the last subproblem's partials.
  double last_rows() const {
    return static_cast<double>(cut_.queries_of_quorum() * cut_.query_chunk_tokens *
                               cut_.group_heads * problem_.query_heads_per_kv_head());
  }

  // Of a sweep over the quorums that computes for `compute` seconds: how much longer it takes for
  // `seconds` of reading each chunk before its first quorum, or of writing it after its last one.
  // With k chunks in a quorum, 1 - exp(-k x) of all chunks are in the first, or last, part x of the
  // quorums, as gaps between a cover's elements are spread like random ones.
  double overhang(double seconds, double compute) const {
    const auto chunks = static_cast<double>(cut_.quorum_size);
    if (cut_.grid || seconds * chunks <= compute) return 0;
    if (!(compute > 0)) return seconds;
    return seconds - compute / chunks * (1 + std::log(seconds * chunks / compute));
  }

  // Of the first sweep; where token rows hold all heads it may read for the others, too.
  double first_reads() const {
    const double entries = static_cast<double>(problem_.batch);
    const double inputs =
        vector_bytes(problem_, static_cast<double>(problem_.query_length), problem_.query_heads) +
        vector_bytes(problem_, static_cast<double>(problem_.key_length), 2 * problem_.kv_heads);
    const bool by_rows = request_.query.layout == Layout::bshd;
    const double bytes = by_rows ? std::min(traffic_.read / entries, inputs)
                                 : traffic_.read / static_cast<double>(sweeps_);
    return bytes / read_rate_;
  }

  // From the last launch on.
  double last_delivery() const {
    const double last = last_rows();
    const double written = last * finished_bytes() / costs_.write;
    if (accumulating_) return last * finished_bytes() / costs_.copy_out + written;
    const double states = last * state_bytes();
    return states / costs_.copy_out + states / costs_.merge + written;
  }

  double entry_bytes() const {
    return rows() * finished_bytes() / static_cast<double>(problem_.batch);
  }
  // Of so many bytes of which, where they are put in order, a head group's are.
  double write_seconds(double bytes) const {
    if (!puts_rows_in_order(request_, cut_.groups)) return bytes / costs_.write;
    const double group = entry_bytes() / static_cast<double>(cut_.groups);
    return (bytes - group) / costs_.write + entry_bytes() / costs_.rewrite;
  }
  double write_seconds() const {
    return static_cast<double>(problem_.batch) * write_seconds(entry_bytes());
  }
  // Of the last sweep.
  double last_writes() const {
    return write_seconds(rows() * finished_bytes() / static_cast<double>(sweeps_));
  }

  double rows() const {
    return static_cast<double>(problem_.batch * problem_.query_heads) *
           static_cast<double>(problem_.query_length);
  }
  double partials() const { return partials_per_row(problem_, cut_); }
  double state_bytes() const {
    return static_cast<double>(softmax_state_bytes(1, problem_.head_dim));
  }
  double finished_bytes() const {
    return static_cast<double>(problem_.head_dim * size_of(problem_.output_dtype) +
                               (request_.lse ? 4 : 0));
  }

  const PlanRequest& request_;
  const Problem& problem_;
  const Cut& cut_;
  const Costs& costs_;
  const bool accumulating_;
  const std::int64_t sweeps_;  // over the quorums
  const double read_rate_;
  const double workers_;
  const double copying_workers_;
  const Traffic traffic_;
};

// First the best for each number of head groups and form, then the second best, and so on.
void mix(std::vector<Candidate>& candidates) {
  std::map<std::pair<std::int64_t, ScheduleForm>, std::int64_t> seen;
  for (Candidate& candidate : candidates) {
    candidate.rank = seen[{candidate.cut.groups, candidate.form}]++;
  }
  std::ranges::stable_sort(candidates, {}, &Candidate::rank);
}

}  // namespace

std::vector<Candidate> candidates_of(const PlanRequest& request, const Costs& costs,
                                     InputKind inputs) {
  std::vector<Candidate> candidates;
  double least = std::numeric_limits<double>::infinity();
  const double launch = kernel_cost(costs, request.problem).launch_seconds;
  for (const Cut& cut : cuts_of(request)) {
    // Launches alone take too long.
    const double launches = launches_of(request.problem, cut);
    if (launches * launch / static_cast<double>(request.workers) > hopeless * least) continue;
    if (smallest_device_arena(request, cut).bytes() > request.device_budget) continue;
    if (smallest_host_bytes(request, cut) > request.host_budget) continue;
    for (const ScheduleForm& form : schedule_forms) {
      if (!may_be(form, request, cut)) continue;
      const auto arenas = arenas_of(request, cut, form);
      if (!arenas) continue;
      const double seconds = Estimate(request, cut, form, *arenas, costs, inputs).seconds();
      candidates.push_back({cut, form, seconds, 0});
      least = std::min(least, seconds);
    }
  }
  std::ranges::stable_sort(candidates, {}, &Candidate::estimate);
  mix(candidates);
  return candidates;
}

PlanRequest pinned(const PlanRequest& request, const Candidate& candidate) {
  const Cut& cut = candidate.cut;
  PlanRequest result = request;
  if (cut.grid) {
    result.grid = cut.grid;
  } else {
    result.chunks = cut.c;
  }
  if (!request.heads_per_group) result.heads_per_group = cut.group_heads;
  result.host_accumulators = !candidate.form.on_device;
  if (cut.has_orders()) result.order = candidate.form.order;
  return result;
}

}  // namespace stream_cqsa
