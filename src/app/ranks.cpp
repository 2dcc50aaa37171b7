#include "app/ranks.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <set>
#include <sstream>

#include "app/machine.hpp"
#include "app/merger.hpp"
#include "app/report.hpp"
#include "engine/merge_shares.hpp"
#include "mpi/merger.hpp"
#include "mpi/worker.hpp"
#include "stream_cqsa/cuda_backend.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

using nlohmann::json;

std::string host_name() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

/// What a rank says of itself before anything else.
json introduction(const ResourceOptions& resources) {
  json devices = json::array();
  try {
    if (resources.backend != "cpu") {
      for (const CudaDevice& device : cuda_devices()) devices.push_back(device.id);
    }
  } catch (const std::exception& error) {
    return {{"error", error.what()}};
  }
  return {{"host", host_name()}, {"backend", resources.backend}, {"devices", devices}};
}

/// Gives every rank its share of its host: on each, the first worker gets the first device that it
/// sees, the second the first one left, and so on.
json seats_for(const std::vector<json>& ranks, int mergers) {
  if (mergers < 0) return "--mergers must not be negative";
  const auto first_worker = static_cast<std::size_t>(mergers) + 1;
  if (first_worker >= ranks.size()) {
    return fmt::format(
        "--mergers {} on {} ranks leaves none to compute: start {} ranks or more, for the master, "
        "the mergers and a worker",
        mergers, ranks.size(), mergers + 2);
  }
  std::map<std::string, int> ranks_on, workers_on;
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    if (ranks[rank].contains("error"))
      return fmt::format("rank {}: {}", rank, ranks[rank]["error"].get<std::string>());
    const auto host = ranks[rank]["host"].get<std::string>();
    ++ranks_on[host];
    if (rank >= first_worker) ++workers_on[host];
  }
  std::map<std::string, std::set<std::string>> taken;
  json seats = json::array();
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    const auto host = ranks[rank]["host"].get<std::string>();
    json seat = {{"ranks", ranks_on[host]},
                 {"workers", std::max(workers_on[host], 1)},
                 {"mergers", mergers}};
    const json& devices = ranks[rank]["devices"];
    if (rank >= first_worker && !devices.empty()) {
      const auto free = std::find_if(devices.begin(), devices.end(), [&](const json& id) {
        return taken[host].insert(id.get<std::string>()).second;
      });
      if (free == devices.end()) {
        return fmt::format(
            "{} workers on {} and {} CUDA device{}: start one rank for each device, and one more "
            "for the master, or use --backend cpu",
            workers_on[host], host, taken[host].size(), taken[host].size() == 1 ? "" : "s");
      }
      seat["device"] = free - devices.begin();
    }
    seats.push_back(seat);
  }
  return seats;
}

// File names may hold any bytes.
std::string text_of(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

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
  OpenProblem open;
  std::unique_ptr<Backend> backend;
  Capacity capacity;
};

json offer_of(const JobOptions& options, Means& means) {
  try {
    means.open = open_problem(options.input, options.attention);
    means.backend = make_backend(options.resources, means.open.problem);
    means.capacity = capacity_of(options.resources, means.open.problem, *means.backend);
  } catch (const std::exception& error) {
    return {{"error", error.what()}};
  }
  return {{"host", host_name()},
          {"traits", to_json_text(means.capacity.device)},
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

}  // namespace

Ranks::Ranks(Communicator& communicator, ResourceOptions& resources) : communicator_(communicator) {
  std::vector<json> ranks;
  for (const std::string& text : communicator_.gather(text_of(introduction(resources))))
    ranks.push_back(parse(text));
  const json seats = parse(communicator_.broadcast(
      communicator_.rank() == 0 ? text_of(seats_for(ranks, resources.mergers)) : ""));
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
}

Ranks::~Ranks() {
  if (!is_master()) return;
  try {
    if (next_ == Step::offers) gather(Step::offers, {});
    if (next_ == Step::plan) {
      broadcast_plan("");
      next_ = Step::none;
    }
    if (next_ == Step::reports) gather(Step::reports, {});
  } catch (const std::exception& error) {
    fmt::print(stderr, "stream-cqsa: {}\n", error.what());
  }
}

std::vector<json> Ranks::gather(Step step, const json& own) {
  next_ = step == Step::offers ? Step::plan : Step::none;
  std::vector<json> all;
  for (const std::string& text : communicator_.gather(text_of(own))) all.push_back(parse(text));
  return all;
}

std::string Ranks::broadcast_plan(const std::string& text) {
  next_ = Step::reports;
  return communicator_.broadcast(text);
}

Capacity Ranks::capacity(const ResourceOptions& own) {
  const std::vector<json> offers = gather(Step::offers, {});
  const auto first_worker = static_cast<std::size_t>(mergers_) + 1;
  Capacity all;
  for (std::size_t rank = 1; rank < offers.size(); ++rank) {
    const json& offer = offers[rank];
    if (offer.contains("error"))
      throw InputError(fmt::format("rank {}: {}", rank, offer["error"].get<std::string>()));
    if (rank < first_worker) {
      merger_budgets_.push_back(offer["host_budget"].get<std::int64_t>());
      continue;
    }
    const DeviceTraits traits = device_traits_from_json(offer["traits"].get<std::string>());
    const auto budget = offer["device_budget"].get<std::int64_t>();
    const bool first = rank == first_worker;
    all.device = first ? traits : common(all.device, traits);
    all.device_budget = first ? budget : std::min(all.device_budget, budget);
  }
  all.device.merges = false;
  all.host_budget = host_budget_of(own);
  all.workers = static_cast<std::int64_t>(offers.size() - first_worker);
  return all;
}

// Finds out, before anybody begins, whether the ranks that merge have memory enough for that.
Plan Ranks::plan_of_master(const Plan& plan) const {
  const std::int64_t workers = communicator_.size() - 1 - mergers_;
  if (mergers_ == 0) return master_plan(plan, workers);
  const MergeShares shares(plan, mergers_);
  const auto plan_of = [&](int rank, std::int64_t budget) {
    try {
      return merger_plan(plan, workers, shares.chunks(rank), budget);
    } catch (const InputError& error) {
      throw InputError(fmt::format("rank {}: {}", rank, error.what()));
    }
  };
  for (int rank = 1; rank <= mergers_; ++rank)
    plan_of(rank, merger_budgets_[static_cast<std::size_t>(rank) - 1]);
  return plan_of(0, plan.request.host_budget);
}

RanksResult Ranks::run(const Plan& plan, const Outputs& outputs, const std::vector<RowIndex>& rows,
                       const RunOptions& options, Telemetry& telemetry) {
  std::ostringstream text;
  text << text_of(merging_json(rows, options.checkpoint)) << "\n";
  write_json(plan, false, text);
  RunOptions own = options;
  own.mergers = mergers_;
  RanksResult result;
  result.master = run_master(plan_of_master(plan), outputs, own, telemetry, communicator_,
                             [&] { broadcast_plan(text.str()); });
  const std::vector<json> reports = gather(Step::reports, {});
  const auto first_worker = reports.begin() + 1 + mergers_;
  result.mergers.assign(reports.begin() + 1, first_worker);
  result.workers.assign(first_worker, reports.end());
  RunResult& run = result.master.run;
  for (const json& merger : result.mergers) add_merger(merger, run);
  for (const json& worker : result.workers) {
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
  } catch (const std::exception& error) {
    // The master waits for messages that will not come.
    communicator_.abort(fmt::format("rank {}: {}", communicator_.rank(), error.what()));
  }
  return 0;
}

void Ranks::compute(const JobOptions& options) {
  Means means;
  gather(Step::offers, offer_of(options, means));
  const std::string text = broadcast_plan("");
  if (text.empty()) return;
  const auto [plan, merging] = read_broadcast(text);
  Telemetry telemetry;
  RunOptions run = run_options(options.resources, plan);
  run.mergers = mergers_;
  const OpenProblem& open = means.open;
  const WorkerResult result = run_worker(
      plan, {means.capacity.device_budget, means.capacity.host_budget},
      {*open.query, *open.key, *open.value}, *means.backend, run, telemetry, communicator_);
  gather(Step::reports, report_of(result, telemetry, means, communicator_.rank()));
}

void Ranks::merge(const JobOptions& options) {
  const json offer = merger_offer(options.resources);
  gather(Step::offers, offer);
  const std::string text = broadcast_plan("");
  if (text.empty()) return;
  const auto [plan, merging] = read_broadcast(text);
  const auto host_budget = offer["host_budget"].get<std::int64_t>();
  Telemetry telemetry;
  RunOptions run = run_options(options.resources, plan);
  run.mergers = mergers_;
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
  gather(Step::reports, report);
}

}  // namespace stream_cqsa
