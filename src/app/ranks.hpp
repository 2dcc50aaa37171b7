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

/// Rank 0, the master, opens the problem, plans and merges; with --mergers M the ranks 1 to M merge
/// too; the others compute. All ranks make this object; then the master calls capacity() and run(),
/// in this order, and the others work(). Should the master end before that, they end too.
class Ranks {
 public:
  /// Collective. Gives this rank its share of its host in `resources`: a device of its own, cores
  /// and memory, and rank 0's number of mergers. With `input_through_master`, on any rank, the
  /// master alone opens the problem and sends the others their inputs. Throws InputError, at rank 0
  /// alone, when there are more workers than devices, or none, or something is `wrong` with the
  /// arguments of a rank.
  Ranks(Communicator& communicator, ResourceOptions& resources, bool input_through_master,
        const std::string& wrong);
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;
  ~Ranks();

  bool is_master() const { return communicator_.rank() == 0; }

  /// What one plan for all workers may use: the smallest device budget, and what each rank has.
  /// Throws what a worker could not do, naming the rank.
  Capacity capacity(const ResourceOptions& own, const OpenProblem& open);

  /// Mergers keep copies of `rows`. Throws as run_master(), and InputError when a rank has too
  /// little memory for its part of the merging.
  RanksResult run(const Plan& plan, const Inputs& inputs, const Outputs& outputs,
                  const std::vector<RowIndex>& rows, const RunOptions& options,
                  Telemetry& telemetry);

  /// A worker's part, or a merger's, until the master says stop, or is lost. Returns the exit
  /// status.
  int work(const JobOptions& options);

 private:
  /// What all ranks do together, in this order. Reports are messages of their own: by then a worker
  /// may be lost.
  enum class Step { inputs, offers, plan, reports, none };
  std::vector<nlohmann::json> gather_offers(const nlohmann::json& own);
  /// What rank 0 has to tell, everywhere.
  std::string broadcast(Step step, const std::string& text);
  /// The master's part of the last step: by rank from 1 on, what it has to report, or what is known
  /// of it where it is lost.
  std::vector<nlohmann::json> receive_reports();
  void send_report(const nlohmann::json& report);
  void compute(const JobOptions& options);
  void merge(const JobOptions& options);
  int end_without_master(const std::string& checkpoint) const;
  std::vector<Plan> merging_plans(const Plan& plan) const;
  bool have_memory(const Plan& plan, const WorkersSoFar& workers) const;
  Tuning tuning_of(const Tuning& own) const;

  Communicator& communicator_;
  int mergers_ = 0;
  std::vector<nlohmann::json> offers_;  ///< at the master: by rank
  PlannedRanks planned_;                ///< at the master: what they offer
  Step next_ = Step::offers;
  bool input_through_master_ = false;
  bool refused_ = false;
};

}  // namespace stream_cqsa
