// One run on several ranks: who has which device, what everybody offers, and the plan for all.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "app/problem.hpp"
#include "app/report.hpp"
#include "mpi/communicator.hpp"
#include "mpi/master.hpp"

namespace stream_cqsa {

/// Rank 0, the master, opens the problem, plans and merges; the others compute. All ranks make this
/// object; then the master calls capacity() and run(), in this order, and the others work(). Should
/// the master end before that, they end too.
class Ranks {
 public:
  /// Collective. Gives this rank its share of its host in `resources`: a device of its own, cores
  /// and memory. Throws InputError, at rank 0 alone, when there are more workers than devices.
  Ranks(Communicator& communicator, ResourceOptions& resources);
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;
  ~Ranks();

  bool is_master() const { return communicator_.rank() == 0; }

  /// What one plan for all workers may use: of each device budget the smallest. Throws what a
  /// worker could not do, naming the rank.
  Capacity capacity(const ResourceOptions& own);

  /// Throws as run_master().
  RanksResult run(const Plan& plan, const Outputs& outputs, const RunOptions& options,
                  Telemetry& telemetry);

  /// A worker's part: computes until the master says stop, or is lost. Returns the exit status.
  int work(const JobOptions& options);

 private:
  /// What all ranks do together, in this order. Reports are messages of their own: by then a worker
  /// may be lost.
  enum class Step { offers, plan, reports, none };
  std::vector<nlohmann::json> gather_offers(const nlohmann::json& own);
  /// The master's part of the last step: by worker, what it has to report, or what is known of it
  /// where it is lost.
  std::vector<nlohmann::json> receive_reports();
  void compute(const JobOptions& options);
  int end_without_master(const std::string& checkpoint) const;
  std::string broadcast_plan(const std::string& text);

  Communicator& communicator_;
  std::vector<nlohmann::json> offers_;  ///< at the master
  Step next_ = Step::offers;
  bool refused_ = false;
};

}  // namespace stream_cqsa
