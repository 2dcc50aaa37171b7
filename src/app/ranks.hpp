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
  /// and memory, and rank 0's number of mergers. Throws InputError, at rank 0 alone, when there are
  /// more workers than devices, or none.
  Ranks(Communicator& communicator, ResourceOptions& resources);
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;
  ~Ranks();

  bool is_master() const { return communicator_.rank() == 0; }

  /// What one plan for all workers may use: of each device budget the smallest. Throws what a
  /// worker could not do, naming the rank.
  Capacity capacity(const ResourceOptions& own);

  /// Mergers keep copies of `rows`. Throws as run_master(), and InputError when a rank has too
  /// little memory for its part of the merging.
  RanksResult run(const Plan& plan, const Outputs& outputs, const std::vector<RowIndex>& rows,
                  const RunOptions& options, Telemetry& telemetry);

  /// A worker's part, or a merger's, until the master says stop. Returns the exit status.
  int work(const JobOptions& options);

 private:
  /// Collective calls, in the order in which all ranks make them.
  enum class Step { offers, plan, reports, none };
  std::vector<nlohmann::json> gather(Step step, const nlohmann::json& own);
  void compute(const JobOptions& options);
  void merge(const JobOptions& options);
  std::string broadcast_plan(const std::string& text);
  Plan plan_of_master(const Plan& plan) const;

  Communicator& communicator_;
  int mergers_ = 0;
  std::vector<std::int64_t> merger_budgets_;  ///< at rank 0: of host memory, in bytes
  Step next_ = Step::offers;
  bool refused_ = false;
};

}  // namespace stream_cqsa
