#include "app/ranks.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>
#include <sstream>

#include "app/audit.hpp"
#include "app/calibration.hpp"
#include "app/described_inputs.hpp"
#include "app/input_files.hpp"
#include "app/json_text.hpp"
#include "app/machine.hpp"
#include "app/merger.hpp"
#include "app/report.hpp"
#include "app/seats.hpp"
#include "core/merge_shares.hpp"
#include "mpi/error.hpp"
#include "mpi/merger.hpp"
#include "mpi/protocol.hpp"
#include "mpi/worker.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

using nlohmann::json;

json parse(const std::string& text) { return json::parse(text); }

/// What rank 0 tells all when the work begins: a line for mergers, and the plan.
std::pair<Plan, json> read_broadcast(const std::string& text) {
  std::istringstream in(text);
  std::string merging;
  std::getline(in, merging);
  Plan plan = read_plan(in, "of rank 0");
  return {std::move(plan), parse(merging)};
}

/// A worker's own means.
struct Means {
  OpenProblem open;                      ///< without tensors where they are
  std::unique_ptr<RemoteInputs> remote;  ///< at the master
  std::unique_ptr<Backend> backend;
  Capacity capacity;

  Inputs inputs() const {
    return remote ? remote->inputs() : Inputs{*open.query, *open.key, *open.value};
  }
};

json rows_of(const Problem& problem) { return {problem.queries_before, problem.query_length}; }

json offer_of(const JobOptions& options, Means& means) {
  try {
    if (!means.remote) {
      means.open =
          open_problem(options.input, options.attention, all_host_budgets(options.resources));
    }
    means.backend = make_backend(options.resources, means.open.problem);
    means.capacity = capacity_of(options.resources, means.open.problem, *means.backend);
  } catch (const std::exception& error) {
    return {{"error", error.what()}};
  }
  const Costs costs = find_costs(means.capacity.device);
  return {{"host", host_name()},
          {"traits", to_json_text(means.capacity.device)},
          {"costs", to_json_text(costs)},
          {"costs_measured", costs.measured},
          {"numerics", means.capacity.numerics},
          {"queries", rows_of(means.open.problem)},
          {"device_budget", means.capacity.device_budget},
          {"host_budget", means.capacity.host_budget}};
}

json merger_offer(const ResourceOptions& resources) {
  try {
    return {{"host_budget", host_budget_of(resources)}};
  } catch (const std::exception& error) {
    return {{"error", error.what()}};
  }
}

WorkerMeans means_of(const json& offer, int rank) {
  WorkerMeans means;
  try {
    means.device = device_traits_from_json(offer.at("traits").get<std::string>());
    means.device_budget = offer.at("device_budget").get<std::int64_t>();
    means.host_budget = offer.at("host_budget").get<std::int64_t>();
    means.costs = costs_from_json(offer.at("costs").get<std::string>(),
                                  fmt::format("costs of rank {}", rank));
    means.costs.measured = offer.at("costs_measured").get<bool>();
  } catch (const json::exception&) {
    throw InputError(fmt::format(
        "rank {}: what it offers is not complete; start the same program on every rank", rank));
  }
  return means;
}

/// The costs of this rank, which sends the workers their inputs where it `serves`.
void add_master(PlannedRanks& ranks, bool serves) {
  ranks.costs = find_costs(ranks.workers.front().device);
  ranks.serves = serves;
  if (!serves) return;
  for (WorkerMeans& worker : ranks.workers) {
    for (const auto rate : {&Costs::read, &Costs::read_direct, &Costs::generate})
      worker.costs.*rate = ranks.costs.*rate;
  }
}

/// Traits that suit every worker.
DeviceTraits common(const DeviceTraits& one, const DeviceTraits& other) {
  const bool first = one.kind == "cuda" || other.kind != "cuda";
  DeviceTraits traits = first ? one : other;  // a GPU's wishes before a CPU's
  if (one.name != other.name) traits.name = one.name + ", " + other.name;
  traits.tile = std::max(one.tile, other.tile);
  traits.slot_alignment = std::max(one.slot_alignment, other.slot_alignment);
  traits.workspace_bytes = std::max(one.workspace_bytes, other.workspace_bytes);
  traits.query_item_bytes = std::max(one.query_item_bytes, other.query_item_bytes);
  traits.key_item_bytes = std::max(one.key_item_bytes, other.key_item_bytes);
  traits.merges = one.merges && other.merges;
  return traits;
}

json report_of(const WorkerResult& result, const Telemetry& telemetry, const Means& means,
               int rank) {
  return {{"rank", rank},
          {"host", host_name()},
          {"device", means.capacity.device.name},
          {"failure", result.failure},
          {"scores_computed", result.scores_computed},
          {"device_bytes", result.device_bytes},
          {"device_in_use", result.device_in_use},
          {"host_bytes", result.host_bytes},
          {"peak_resident", peak_resident_bytes()},
          {"stages", stages_json(telemetry.totals())}};
}

// Of a rank that tells no more: what it did is not known.
json report_of_lost(const json& offer, int rank) {
  WorkerResult result;
  result.failure = lost_text;
  json report = report_of(result, Telemetry(), Means(), rank);
  report["host"] = offer["host"];
  report["device"] = device_traits_from_json(offer["traits"].get<std::string>()).name;
  report["peak_resident"] = 0;
  return report;
}

}  // namespace

Ranks::Ranks(Communicator& communicator, ResourceOptions& resources, bool input_through_master,
             const std::string& wrong)
    : communicator_(communicator) {
  std::vector<json> ranks;
  const std::string own_text = json_text(
      wrong.empty() ? introduction(resources, input_through_master) : json{{"error", wrong}});
  for (const std::string& text : communicator_.gather(own_text)) ranks.push_back(parse(text));
  const json seats = parse(communicator_.broadcast(
      communicator_.rank() == 0 ? json_text(seats_for(ranks, resources.mergers)) : ""));
  refused_ = seats.is_string();
  if (refused_) {
    next_ = Step::none;
    if (is_master()) throw InputError(seats.get<std::string>());
    return;
  }
  const json& own = seats[static_cast<std::size_t>(communicator_.rank())];
  resources.cuda_device = own.value("device", 0);
  resources.ranks_on_host = own["ranks"].get<int>();
  resources.workers_on_host = own["workers"].get<int>();
  resources.mergers = mergers_ = own["mergers"].get<int>();
  input_through_master_ = own["input_through_master"].get<bool>();
  if (input_through_master_) next_ = Step::inputs;
}

Ranks::~Ranks() {
  if (!is_master()) return;
  try {
    // Nothing to be told: the workers end.
    if (next_ == Step::offers) gather_offers({});
    if (next_ == Step::inputs || next_ == Step::plan) {
      broadcast(next_, "");
      next_ = Step::none;
    }
    if (next_ == Step::reports) receive_reports();
  } catch (const std::exception& error) {
    fmt::print(stderr, "stream-cqsa: {}\n", error.what());
  }
}

std::vector<json> Ranks::gather_offers(const json& own) {
  next_ = Step::plan;
  std::vector<json> all;
  for (const std::string& text : communicator_.gather(json_text(own))) all.push_back(parse(text));
  return all;
}

std::vector<json> Ranks::receive_reports() {
  next_ = Step::none;
  std::vector<json> all;
  for (int rank = 1; rank < communicator_.size(); ++rank) {
    const auto text = communicator_.receive_text(rank, report_tag);
    all.push_back(text ? parse(*text)
                       : report_of_lost(offers_.at(static_cast<std::size_t>(rank)), rank));
  }
  return all;
}

void Ranks::send_report(const json& report) {
  communicator_.send_text(0, report_tag, json_text(report));
}

std::string Ranks::broadcast(Step step, const std::string& text) {
  next_ = step == Step::inputs ? Step::offers : Step::reports;
  return communicator_.broadcast(text);
}

Capacity Ranks::capacity(const ResourceOptions& own, const OpenProblem& open) {
  if (input_through_master_) broadcast(Step::inputs, json_text(describe_inputs(open)));
  offers_ = gather_offers({});
  const auto first_worker = static_cast<std::size_t>(mergers_) + 1;
  Capacity all;
  PlannedRanks& ranks = all.ranks.emplace();
  std::set<std::string> numerics;
  for (std::size_t rank = 1; rank < offers_.size(); ++rank) {
    const json& offer = offers_[rank];
    if (offer.contains("error"))
      throw InputError(fmt::format("rank {}: {}", rank, offer["error"].get<std::string>()));
    if (rank < first_worker) {
      ranks.merger_budgets.push_back(offer["host_budget"].get<std::int64_t>());
      continue;
    }
    if (offer["queries"] != rows_of(open.problem)) {
      throw InputError(fmt::format(
          "rank {}: its query rows are {} and rank 0's {}; give all ranks the same inputs and "
          "--queries",
          rank, offer["queries"].dump(), rows_of(open.problem).dump()));
    }
    const bool first = rank == first_worker;
    const WorkerMeans& worker = ranks.workers.emplace_back(means_of(offer, rank));
    all.device = first ? worker.device : common(all.device, worker.device);
    numerics.insert(offer["numerics"].get<std::string>());
    all.device_budget =
        first ? worker.device_budget : std::min(all.device_budget, worker.device_budget);
  }
  add_master(ranks, input_through_master_);
  planned_ = ranks;
  all.numerics = fmt::format("{}", fmt::join(numerics, "; "));
  all.host_budget = host_budget_of(own);
  all.workers = std::ssize(ranks.workers);
  return all;
}

// Of each rank that merges. Throws, before anybody begins, where one has too little memory.
std::vector<Plan> Ranks::merging_plans(const Plan& plan) const {
  const MergeShares shares(plan, mergers_);
  std::vector<Plan> plans;
  for (int rank = 0; rank <= mergers_; ++rank) {
    try {
      plans.push_back(merger_plan(plan, std::ssize(planned_.workers), shares.chunks(rank),
                                  rank == 0
                                      ? plan.request.host_budget
                                      : planned_.merger_budgets[static_cast<std::size_t>(rank) - 1],
                                  rank == 0 && input_through_master_));
    } catch (const InputError& error) {
      if (mergers_ == 0) throw;
      throw InputError(fmt::format("rank {}: {}", rank, error.what()));
    }
  }
  return plans;
}

// Whether all that take part could go on by a later plan, none of them with more in a file than the
// plan says.
bool Ranks::have_memory(const Plan& plan, const WorkersSoFar& workers) const {
  try {
    for (const Plan& merging : merging_plans(plan)) {
      if (merging.placement == AccumulatorPlacement::file && plan.placement != merging.placement)
        return false;
    }
    for (std::size_t i = 0; i < workers.size(); ++i) {
      const WorkerMeans& worker = planned_.workers[i];
      if (workers[i]) worker_plan(plan, worker.device, worker.device_budget, worker.host_budget);
    }
    return true;
  } catch (const InputError&) {
    return false;
  }
}

Tuning Ranks::tuning_of(const Tuning& own) const {
  Tuning tuning = own;
  tuning.costs = planned_.costs;
  for (const WorkerMeans& worker : planned_.workers) tuning.workers.push_back(worker.costs);
  tuning.has_memory = [this](const Plan& plan, const WorkersSoFar& workers) {
    return have_memory(plan, workers);
  };
  return tuning;
}

RanksResult Ranks::run(const Plan& plan, const Inputs& inputs, const Outputs& outputs,
                       const std::vector<RowIndex>& rows, const RunOptions& options,
                       Telemetry& telemetry) {
  std::ostringstream text;
  text << json_text(merging_json(rows, options.checkpoint)) << "\n";
  write_json(plan, false, text);
  RunOptions own = options;
  own.mergers = mergers_;
  if (options.tuning) own.tuning = tuning_of(*options.tuning);
  merging_plans(plan);
  RanksResult result;
  result.master = run_master(
      plan, outputs, own, telemetry, communicator_, [&] { broadcast(Step::plan, text.str()); },
      input_through_master_ ? &inputs : nullptr);
  const std::vector<json> reports = receive_reports();
  const auto first_worker = reports.begin() + mergers_;
  result.mergers.assign(reports.begin(), first_worker);
  result.workers.assign(first_worker, reports.end());
  result.read = take_inputs(result.workers);
  RunResult& run = result.master.run;
  for (const json& merger : result.mergers) add_merger(merger, run);
  for (const json& worker : result.workers) {
    std::string& failure =
        result.master
            .failures[worker["rank"].get<std::size_t>() - 1 - static_cast<std::size_t>(mergers_)];
    if (failure.empty()) failure = worker["failure"].get<std::string>();  // lost since it ended
    run.scores_computed += worker["scores_computed"].get<std::uint64_t>();
    run.device_bytes = std::max(run.device_bytes, worker["device_bytes"].get<std::int64_t>());
    run.device_in_use = std::max(run.device_in_use, worker["device_in_use"].get<std::int64_t>());
  }
  return result;
}

int Ranks::work(const JobOptions& options) {
  if (refused_) return 0;
  try {
    if (communicator_.rank() <= mergers_) {
      merge(options);
    } else {
      compute(options);
    }
  } catch (const LostRank& lost) {
    communicator_.newly_lost();
    if (communicator_.is_lost(0)) return end_without_master(options.resources.checkpoint);
    const bool durable = !options.resources.checkpoint.empty();
    communicator_.abort(fmt::format("rank {}: {}{}", communicator_.rank(), lost.what(),
                                    durable ? "; the same command continues" : ""),
                        durable ? stopped_status : 1);
  } catch (const std::exception& error) {
    // The master waits for messages that will not come.
    communicator_.abort(fmt::format("rank {}: {}", communicator_.rank(), error.what()));
  }
  return 0;
}

// All workers come here; the first one that is left speaks for them.
int Ranks::end_without_master(const std::string& checkpoint) const {
  int speaker = 1;
  while (communicator_.is_lost(speaker)) ++speaker;
  if (speaker == communicator_.rank()) {
    fmt::print(stderr, "stream-cqsa: rank 0, the master, was lost; {}\n",
               checkpoint.empty()
                   ? "nothing is kept of a run without --checkpoint DIR"
                   : "the same command continues from the checkpoint in " + checkpoint);
  }
  return checkpoint.empty() ? 1 : stopped_status;
}

void Ranks::compute(const JobOptions& options) {
  Means means;
  if (input_through_master_) {
    const std::string description = broadcast(Step::inputs, "");
    if (description.empty()) return;
    DescribedInputs described = described_inputs(parse(description), communicator_);
    means.remote = std::move(described.inputs);
    means.open.problem = described.problem;
  }
  gather_offers(offer_of(options, means));
  const std::string text = broadcast(Step::plan, "");
  if (text.empty()) return;
  const auto [plan, merging] = read_broadcast(text);
  Telemetry telemetry;
  RunOptions run = run_options(options.resources, plan.request.device);
  run.mergers = mergers_;
  run.warn = [this](const std::string& line) {
    fmt::print(stderr, "stream-cqsa: rank {}: {}\n", communicator_.rank(), line);
  };
  // What comes from the master is watched there.
  AuditedInputs audited(means.inputs(), telemetry);
  const WorkerResult result =
      run_worker(plan, {means.capacity.device_budget, means.capacity.host_budget},
                 means.remote ? means.inputs() : audited.inputs(), *means.backend, run, telemetry,
                 communicator_, means.remote.get());
  json report = report_of(result, telemetry, means, communicator_.rank());
  report["inputs"] = {{"query", audited.query.parts().to_text()},
                      {"key", audited.key.parts().to_text()},
                      {"value", audited.value.parts().to_text()}};
  send_report(report);
}

void Ranks::merge(const JobOptions& options) {
  if (input_through_master_ && broadcast(Step::inputs, "").empty()) return;
  const json offer = merger_offer(options.resources);
  gather_offers(offer);
  const std::string text = broadcast(Step::plan, "");
  if (text.empty()) return;
  const auto [plan, merging] = read_broadcast(text);
  const auto host_budget = offer["host_budget"].get<std::int64_t>();
  Telemetry telemetry;
  RunOptions run = run_options(options.resources, plan.request.device);
  run.mergers = mergers_;
  run.goes_direct = [&](std::int64_t bytes) {
    return goes_direct(options.input, bytes, host_budget);
  };
  MergedOutputs outputs(plan, options, merging, communicator_.rank(), telemetry);
  run.checkpoint = outputs.checkpoint();
  const MergerResult result = run_merger(
      plan, host_budget, [&] { return outputs.open(); }, run, telemetry, communicator_);
  json report =
      report_of(result, telemetry, MergeShares(plan, mergers_).chunks(communicator_.rank()));
  report["rank"] = communicator_.rank();
  report["host"] = host_name();
  report["host_budget"] = host_budget;
  outputs.add_seen(report);
  send_report(report);
}

}  // namespace stream_cqsa
