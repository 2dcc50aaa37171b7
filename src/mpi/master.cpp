#include "mpi/master.hpp"

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>

#include "engine/passes.hpp"
#include "mpi/later_plan.hpp"
#include "mpi/master_pass.hpp"

namespace stream_cqsa {
namespace {

void add(MasterResult& all, MasterResult pass) {
  add_pass(all.run, pass.run);
  all.failures = std::move(pass.failures);
  all.subproblems.resize(pass.subproblems.size());
  std::ranges::transform(pass.subproblems, all.subproblems, all.subproblems.begin(), std::plus<>());
  all.repeated += pass.repeated;
  all.withdrawn += pass.withdrawn;
  all.dispatch_seconds += pass.dispatch_seconds;
  all.stalled_seconds += pass.stalled_seconds;
  all.served.buffers = std::max(all.served.buffers, pass.served.buffers);
  all.served.buffer_bytes = std::max(all.served.buffer_bytes, pass.served.buffer_bytes);
  all.served.blocks += pass.served.blocks;
  all.served.bytes += pass.served.bytes;
}

}  // namespace

MasterResult run_master(const Plan& planned, const Outputs& outputs, const RunOptions& options,
                        Telemetry& telemetry, Communicator& communicator,
                        const std::function<void()>& ready, const Inputs* served) {
  check_outputs(planned, outputs);
  if (served) check_inputs(planned, *served);
  const MasterRun run{outputs, options, telemetry, communicator, served};
  const std::int64_t workers = communicator.size() - 1 - options.mergers;
  const bool durable = !options.checkpoint.directory.empty();
  CheckpointOptions checkpoint = options.checkpoint;
  MasterResult all;
  all.failures.resize(static_cast<std::size_t>(workers));
  double began = 0;
  Plan plan = planned;

  std::optional<Tuner> tuner;
  AskForPlan ask;
  if (options.tuning) {
    tuner.emplace(*options.tuning);
    ask = [&](const RunSoFar& so_far, const WorkersSoFar& of_workers, std::int64_t from,
              double switch_seconds) {
      const auto may_take = [&](const Plan& next) {
        const Tuning& tuning = *options.tuning;
        return (!tuning.has_memory || tuning.has_memory(next, of_workers)) &&
               can_go_on_by(plan, next, durable, tuning.has_room);
      };
      return tuner->ask(plan, so_far, from, switch_seconds, may_take, of_workers);
    };
  }

  OthersWaiting others(communicator);
  for (bool first = true;; first = false) {
    const MergeShares shares(plan, options.mergers);
    const Plan own =
        merger_plan(plan, workers, shares.chunks(0), plan.request.host_budget, served != nullptr);
    const auto tell = [&] { first ? ready() : others.tell(plan); };
    Pass pass = run_pass(own, shares, run, checkpoint, all.failures, ask, tell, others);
    if (first) began = pass.began;
    add(all, std::move(pass.result));
    all.run.seconds = now_seconds() - began;
    if (!pass.again) return all;
    if (options.warn) options.warn(describe(*pass.again));
    all.run.planned_again.push_back(std::move(*pass.again));
    plan = all.run.planned_again.back().plan;
    checkpoint.same_run = true;
  }
}

}  // namespace stream_cqsa
