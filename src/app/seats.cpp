#include "app/seats.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>

#include "app/machine.hpp"
#include "stream_cqsa/cuda_backend.hpp"

namespace stream_cqsa {

using nlohmann::json;

json introduction(const ResourceOptions& resources, bool input_through_master) {
  json devices = json::array();
  try {
    if (resources.backend != "cpu") {
      for (const CudaDevice& device : cuda_devices()) devices.push_back(device.id);
    }
  } catch (const std::exception& error) {
    return {{"error", error.what()}};
  }
  return {{"host", host_name()},
          {"backend", resources.backend},
          {"devices", devices},
          {"input_through_master", input_through_master}};
}

json seats_for(const std::vector<json>& ranks, int mergers) {
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    if (!ranks[rank].contains("error")) continue;
    const auto error = ranks[rank]["error"].get<std::string>();
    return rank == 0 ? error : fmt::format("rank {}: {}", rank, error);
  }
  if (mergers < 0) return "--mergers must not be negative";
  const auto first_worker = static_cast<std::size_t>(mergers) + 1;
  if (first_worker >= ranks.size()) {
    return fmt::format(
        "--mergers {} on {} ranks leaves none to compute: start {} ranks or more, for the master, "
        "the mergers and a worker",
        mergers, ranks.size(), mergers + 2);
  }
  std::map<std::string, int> ranks_on, workers_on;
  bool through_master = false;
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    const auto host = ranks[rank]["host"].get<std::string>();
    through_master = through_master || ranks[rank]["input_through_master"].get<bool>();
    ++ranks_on[host];
    if (rank >= first_worker) ++workers_on[host];
  }
  std::map<std::string, std::set<std::string>> taken;
  json seats = json::array();
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    const auto host = ranks[rank]["host"].get<std::string>();
    json seat = {{"ranks", ranks_on[host]},
                 {"workers", std::max(workers_on[host], 1)},
                 {"mergers", mergers},
                 {"input_through_master", through_master}};
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

}  // namespace stream_cqsa
