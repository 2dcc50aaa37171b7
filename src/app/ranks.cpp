#include "app/ranks.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <set>
#include <sstream>

#include "app/machine.hpp"
#include "app/report.hpp"
#include "mpi/error.hpp"
#include "mpi/protocol.hpp"
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
json seats_for(const std::vector<json>& ranks) {
  std::map<std::string, int> ranks_on, workers_on;
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    if (ranks[rank].contains("error"))
      return fmt::format("rank {}: {}", rank, ranks[rank]["error"].get<std::string>());
    const auto host = ranks[rank]["host"].get<std::string>();
    ++ranks_on[host];
    if (rank > 0) ++workers_on[host];
  }
  std::map<std::string, std::set<std::string>> taken;
  json seats = json::array();
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    const auto host = ranks[rank]["host"].get<std::string>();
    json seat = {{"ranks", ranks_on[host]}, {"workers", std::max(workers_on[host], 1)}};
    const json& devices = ranks[rank]["devices"];
    if (rank > 0 && !devices.empty()) {
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

Ranks::Ranks(Communicator& communicator, ResourceOptions& resources) : communicator_(communicator) {
  std::vector<json> ranks;
  for (const std::string& text : communicator_.gather(text_of(introduction(resources))))
    ranks.push_back(parse(text));
  const json seats =
      parse(communicator_.broadcast(communicator_.rank() == 0 ? text_of(seats_for(ranks)) : ""));
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
}

Ranks::~Ranks() {
  if (!is_master()) return;
  try {
    if (next_ == Step::offers) gather_offers({});
    if (next_ == Step::plan) {
      broadcast_plan("");
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
  for (const std::string& text : communicator_.gather(text_of(own))) all.push_back(parse(text));
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

std::string Ranks::broadcast_plan(const std::string& text) {
  next_ = Step::reports;
  return communicator_.broadcast(text);
}

Capacity Ranks::capacity(const ResourceOptions& own) {
  offers_ = gather_offers({});
  Capacity all;
  for (std::size_t rank = 1; rank < offers_.size(); ++rank) {
    const json& offer = offers_[rank];
    if (offer.contains("error"))
      throw InputError(fmt::format("rank {}: {}", rank, offer["error"].get<std::string>()));
    const DeviceTraits traits = device_traits_from_json(offer["traits"].get<std::string>());
    const auto budget = offer["device_budget"].get<std::int64_t>();
    all.device = rank == 1 ? traits : common(all.device, traits);
    all.device_budget = rank == 1 ? budget : std::min(all.device_budget, budget);
  }
  all.device.merges = false;
  all.host_budget = host_budget_of(own);
  all.workers = static_cast<std::int64_t>(offers_.size()) - 1;
  return all;
}

RanksResult Ranks::run(const Plan& plan, const Outputs& outputs, const RunOptions& options,
                       Telemetry& telemetry) {
  std::ostringstream text;
  write_json(plan, false, text);
  RanksResult result;
  const std::int64_t workers = communicator_.size() - 1;
  result.master = run_master(master_plan(plan, workers), outputs, options, telemetry, communicator_,
                             [&] { broadcast_plan(text.str()); });
  result.workers = receive_reports();
  RunResult& run = result.master.run;
  for (const json& worker : result.workers) {
    std::string& failure = result.master.failures[worker["rank"].get<std::size_t>() - 1];
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
    compute(options);
  } catch (const LostRank& lost) {
    communicator_.newly_lost();
    if (communicator_.is_lost(0)) return end_without_master(options.resources.checkpoint);
    communicator_.abort(fmt::format("rank {}: {}", communicator_.rank(), lost.what()));
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
  gather_offers(offer_of(options, means));
  const std::string text = broadcast_plan("");
  if (text.empty()) return;
  std::istringstream in(text);
  const Plan plan = read_plan(in, "of rank 0");
  Telemetry telemetry;
  const OpenProblem& open = means.open;
  const WorkerResult result =
      run_worker(plan, {means.capacity.device_budget, means.capacity.host_budget},
                 {*open.query, *open.key, *open.value}, *means.backend,
                 run_options(options.resources, plan), telemetry, communicator_);
  communicator_.send_text(0, report_tag,
                          text_of(report_of(result, telemetry, means, communicator_.rank())));
}

}  // namespace stream_cqsa
