#include "app/planning.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "app/division_options.hpp"
#include "app/text.hpp"
#include "core/plan_sizes.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

// The plan of --plan, which must be one for `request` but for budgets and division.
Plan read_plan_file(const ResourceOptions& resources, const PlanRequest& request) {
  if (!resources.device_memory.empty() || !resources.host_memory.empty() || request.chunks ||
      !resources.division.empty() || request.grid || request.heads_per_group) {
    throw InputError(
        "--plan has its own budgets and division; leave out --device-memory, --host-memory, "
        "--division, --chunks, --grid and --heads-per-group");
  }
  std::ifstream file(resources.plan);
  if (!file || std::filesystem::is_directory(resources.plan)) {
    throw InputError(fmt::format("{}: cannot be read", resources.plan));
  }
  Plan plan = read_plan(file, resources.plan);
  const std::string differences = mismatch(plan.request, request);
  if (!differences.empty()) {
    throw InputError(
        fmt::format("{}: was made {}; make it again with plan --json and the same options",
                    resources.plan, differences));
  }
  if (plan.placement == AccumulatorPlacement::file && !request.scratch) {
    throw InputError(fmt::format("{}: the plan keeps accumulators in a file; give --scratch DIR",
                                 resources.plan));
  }
  return plan;
}

// The plan of --plan, as these ranks can run it.
Plan given_plan(const ResourceOptions& resources, const PlanRequest& request,
                const Capacity& capacity) {
  const Plan plan = read_plan_file(resources, request);
  // On the workers' devices where whole head groups keep them busy and each has room for the
  // plan's.
  const bool fits_workers =
      capacity.workers == 0 ||
      (capacity.device.merges && capacity.device_budget >= plan.device.bytes());
  const bool on_host = request.host_accumulators || !fits_workers ||
                       !shares_by_groups(request, static_cast<std::int64_t>(plan.groups.size()));
  return on_host ? with_host_accumulators(plan) : plan;
}

bool is_one_chunk(const PlanRequest& request) {
  try {
    return make_plan(request).division.chunk_count() == 1;
  } catch (const InputError&) {  // that nothing fits is said by who needs a plan
    return false;
  }
}

/// What the options leave open.
struct Choices {
  PlanRequest request;
  Divisions divisions = Divisions::requested;
};

Choices choices_for(const OpenProblem& open, const ResourceOptions& resources, bool lse,
                    const Capacity& capacity) {
  Choices choices{request_for(open, resources, lse, capacity)};
  const bool tiles =
      prefers_tiles(resources, choices.request.problem) && !is_one_chunk(choices.request);
  if (tiles) choices.request.scheme = Scheme::tiles;
  if (tiles || leaves_division_open(resources)) choices.divisions = Divisions::any;
  return choices;
}

// "1: 33.4 s, 2: 16.9 s, bound by compute; 4: 12.0 s, bound by merge"
std::string describe(const std::vector<ForWorkers>& all) {
  std::string text;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto& [workers, prediction] = all[i];
    text += fmt::format("{}: {}", workers, format_duration(prediction.seconds));
    const bool last = i + 1 == all.size();
    const Stage bottleneck = prediction.bottleneck();
    const bool ends = last || all[i + 1].prediction.bottleneck() != bottleneck;
    if (ends) text += fmt::format(", bound by {}", name_of(bottleneck));
    if (!last) text += ends ? "; " : ", ";
  }
  return text;
}

std::string why_lost(const Alternative& other, double chosen) {
  const Prediction& prediction = other.prediction;
  const Stage bottleneck = prediction.bottleneck();
  const double more = 100 * (prediction.seconds / chosen - 1);
  return fmt::format(
      "{}, {}, bound by {} ({:.0f}%){}", format_duration(prediction.seconds),
      std::abs(more) < 0.05 ? "as long" : fmt::format("{:+.1f}%", more), name_of(bottleneck),
      100 * prediction.busy_of(bottleneck) / prediction.seconds,
      other.is_default ? fmt::format(", the default of {}", name_of(other.request.scheme)) : "");
}

}  // namespace

PlanChoice choose_for(const OpenProblem& open, const ResourceOptions& resources, bool lse,
                      const Capacity& capacity) {
  if (resources.plan.empty()) {
    const Choices choices = choices_for(open, resources, lse, capacity);
    return choose_plan(choices.request, ranks_of(choices.request.device, capacity), open.inputs,
                       choices.divisions);
  }
  const PlanRequest request = request_for(open, resources, lse, capacity);
  const Plan plan = given_plan(resources, request, capacity);
  Plan here = plan;
  // Those of a plan that is read are others.
  here.request.workers = request.workers;
  here.request.mergers = request.mergers;
  return {plan, predict(here, costs_here(here, capacity), open.inputs), false, {}};
}

std::vector<ForWorkers> choose_for_workers(const OpenProblem& open,
                                           const ResourceOptions& resources, bool lse,
                                           const Capacity& capacity, const Prediction& of_all) {
  std::vector<ForWorkers> all;
  Capacity fewer = capacity;
  for (fewer.workers = 1; fewer.workers < capacity.workers; fewer.workers *= 2) {
    try {
      all.push_back({fewer.workers, choose_for(open, resources, lse, fewer).prediction});
    } catch (const InputError&) {  // so few have no room for any plan
    }
  }
  all.push_back({capacity.workers, of_all});
  return all;
}

Plan plan_for(const OpenProblem& open, const ResourceOptions& resources, bool lse,
              const Capacity& capacity) {
  return choose_for(open, resources, lse, capacity).plan;
}

SmallestBudgets smallest_for(const OpenProblem& open, const ResourceOptions& resources, bool lse,
                             const Capacity& capacity, const Plan& plan) {
  if (!resources.plan.empty()) return smallest_budgets(plan.request);
  const Choices choices = choices_for(open, resources, lse, capacity);
  return smallest_budgets(choices.request, choices.divisions);
}

std::string describe(const PlanChoice& choice, const SmallestBudgets& smallest) {
  std::string text;
  const auto line = [&](std::string_view label, const std::string& what) {
    fmt::format_to(std::back_inserter(text), "{:<18}{}\n", label, what);
  };
  const double seconds = choice.prediction.seconds;
  const auto is_default = [](const Alternative& other) { return other.is_default; };
  if (choice.is_default && !choice.others.empty()) {
    line("chosen", fmt::format("the default: no other is predicted to be more than {:.0f}% faster",
                               100 * prediction_tolerance));
  } else if (std::ranges::any_of(choice.others, is_default)) {
    line("chosen", division_text(choice.plan) + ": predicted to be faster than the default");
  }
  if (!choice.for_workers.empty()) line("workers", describe(choice.for_workers));
  const std::size_t printed = std::min(choice.others.size(), most_printed);
  for (std::size_t i = 0; i < printed; ++i) {
    const Alternative& other = choice.others[i];
    line(i == 0 ? "runners-up" : "", division_text(other) + ": " + why_lost(other, seconds));
  }
  line(
      "smallest budgets",
      fmt::format("device {} ({} bytes) with this host memory, host {} ({} bytes) with this device "
                  "memory: what works, however slow",
                  format_bytes(smallest.device), smallest.device, format_bytes(smallest.host),
                  smallest.host));
  return text;
}

}  // namespace stream_cqsa
