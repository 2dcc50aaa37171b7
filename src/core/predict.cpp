// The timeline of a plan: what each stage does when, by rates alone.
#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "core/plan_demands.hpp"
#include "stream_cqsa/costs.hpp"

namespace stream_cqsa {
namespace {

// Of more subproblems the others are taken to go on like these.
constexpr std::int64_t most_followed = 1 << 20;

// Of outputs. Where rows come in several head groups these are staged, and the last rewrites all.
double write_rate(const Plan& plan, const Costs& costs) {
  const auto groups = static_cast<double>(plan.groups.size());
  if (plan.request.output_layout != Layout::bshd || groups < 2) return costs.write;
  const double staged = 1 - 1 / groups;
  return (staged + 1) / (staged / costs.write + 1 / costs.rewrite);
}

// Of accumulators to and from their file, half of the bytes each way.
double spill_rate(const Costs& costs) { return 2 / (1 / costs.write + 1 / costs.read); }

// One thing after another.
struct Lane {
  double free = 0;
  double busy = 0;

  // Starts when it is free and `ready`; when it ends.
  double run(double ready, double seconds) {
    free = std::max(free, ready) + seconds;
    busy += seconds;
    return free;
  }
};

// When the last ones ended.
class Ends {
 public:
  void add(double end) { ends_[static_cast<std::size_t>(count_++ % most)] = end; }
  // Of the one `back` before the next; from the start where there was none, or too long ago.
  double before(std::int64_t back) const {
    if (back > std::min(count_, most)) return 0;
    return ends_[static_cast<std::size_t>((count_ - back) % most)];
  }

 private:
  static constexpr std::int64_t most = 64;
  std::int64_t count_ = 0;
  std::array<double, most> ends_{};
};

struct Worker {
  Lane copy_in, compute, copy_out;
  Ends computed, copied_out;
  double flop = 0;
  double launches = 0;
};

class Timeline {
 public:
  Timeline(const Plan& plan, const Demands& demands, const Costs& costs, double read_rate)
      : plan_(plan),
        costs_(costs),
        kernel_(kernel_cost(costs, plan.problem())),
        demands_(demands),
        workers_(static_cast<std::size_t>(plan.request.workers)),
        read_rate_(read_rate),
        on_device_(plan.placement == AccumulatorPlacement::device) {}

  // Of the head groups from this one on.
  Prediction run(std::int64_t from) {
    from = std::max(from, plan_.groups_done);
    const auto groups = static_cast<std::int64_t>(plan_.groups.size());
    const std::int64_t left = (group_total(plan_) - from) * plan_.division.quorum_count();
    const std::int64_t most = std::min(left, most_followed);
    std::int64_t followed = 0;
    for (std::int64_t id = plan_.id({from / groups, 0, 0}); followed < most; ++id) {
      const SubproblemKey key = plan_.key(id);
      if (group_number(plan_, key.batch, key.group) < from) continue;
      ++followed;
      const Demand demand = demands_.of(key);
      if (!(demand.flop > 0)) continue;  // nothing of it is ever loaded
      Worker& worker = worker_of(key);
      deliver(worker, demand, compute(worker, demand, load(worker, demand)));
    }
    return prediction(followed > 0 ? static_cast<double>(left) / static_cast<double>(followed) : 1);
  }

 private:
  // Whole head groups in turn where these are merged on the workers' devices, else who is done
  // first.
  Worker& worker_of(const SubproblemKey& key) {
    if (on_device_) {
      const auto group = key.batch * static_cast<std::int64_t>(plan_.groups.size()) + key.group;
      return workers_[static_cast<std::size_t>(group) % workers_.size()];
    }
    return *std::ranges::min_element(workers_, {},
                                     [](const Worker& worker) { return worker.compute.free; });
  }

  double load(Worker& worker, const Demand& demand);
  double compute(Worker& worker, const Demand& demand, double loaded);
  void deliver(Worker& worker, const Demand& demand, double computed);
  Prediction prediction(double of_followed) const;

  const Plan& plan_;
  const Costs& costs_;
  const KernelCost& kernel_;
  const Demands& demands_;
  Lane read_, receive_, spill_, merge_, write_;
  std::vector<Worker> workers_;
  const double read_rate_;
  const bool on_device_;
};

// Reads and copies in; when the subproblem's chunks are there.
double Timeline::load(Worker& worker, const Demand& demand) {
  const double read = read_.run(0, demand.read_bytes / read_rate_);
  const double seconds = demand.copied_bytes / costs_.copy_in;
  // New chunks take the place of those of the subproblem before, which must have been computed, as
  // far as there are no slots beside.
  const double beside = static_cast<double>(plan_.device.kv_slots) - demand.key_chunks;
  const double ahead = std::clamp(beside / std::max(demand.new_chunks, 1.0), 0.0, 1.0);
  double copied = worker.copy_in.run(worker.computed.before(ahead < 1 ? 2 : 3), seconds);
  copied = std::max(copied, worker.computed.before(1) + (1 - ahead) * seconds);
  if (demand.read_bytes > 0) copied = std::max(copied, read);
  return worker.copy_in.free = copied;
}

double Timeline::compute(Worker& worker, const Demand& demand, double loaded) {
  // Of all that the worker has computed so far: clocks depend on what came before.
  const double before = kernel_seconds(kernel_, worker.flop, worker.launches);
  worker.flop += demand.flop;
  ++worker.launches;
  double seconds = kernel_seconds(kernel_, worker.flop, worker.launches) - before;
  double emptied = 0;
  if (on_device_) {
    if (plan_.division.most_partials() > 1) seconds += demand.partial_bytes / costs_.device_merge;
  } else {
    const double sets =
        static_cast<double>(plan_.device.state_slots) / std::max(demand.query_chunks, 1.0);
    emptied = worker.copied_out.before(std::max<std::int64_t>(1, static_cast<std::int64_t>(sets)));
  }
  const double computed = worker.compute.run(std::max(loaded, emptied), seconds);
  worker.computed.add(computed);
  return computed;
}

void Timeline::deliver(Worker& worker, const Demand& demand, double computed) {
  const double bytes = on_device_ ? demand.finished_bytes : demand.partial_bytes;
  // Copies out wait for the buffers that merging empties.
  const auto buffers =
      static_cast<double>(plan_.host.state_buffers * plan_.host.state_buffer_bytes);
  const double room = on_device_ ? 0.0 : merge_.free - buffers / costs_.merge;
  double out = worker.copy_out.run(std::max(computed, room), bytes / costs_.copy_out);
  worker.copied_out.add(out);
  if (workers_.size() > 1) out = receive_.run(out, bytes / costs_.receive);
  if (!on_device_) {
    out = spill_.run(out, demand.spilled_bytes / spill_rate(costs_));
    out = merge_.run(out, bytes / costs_.merge);
  }
  write_.run(out, demand.written_bytes / costs_.write + demand.rewritten_bytes / costs_.rewrite);
}

Prediction Timeline::prediction(double of_followed) const {
  Prediction result;
  const auto at_least = [&](Stage stage, double seconds) {
    double& busy = result.busy[static_cast<std::size_t>(stage)];
    busy = std::max(busy, seconds);
  };
  double end = std::max(merge_.free, write_.free);
  for (const Worker& worker : workers_) {
    end = std::max({end, worker.compute.free, worker.copy_out.free});
    at_least(Stage::copy_in, worker.copy_in.busy);
    at_least(Stage::compute, worker.compute.busy);
    at_least(Stage::copy_out, worker.copy_out.busy);
  }
  at_least(Stage::read, read_.busy);
  at_least(Stage::transfer, receive_.busy);
  at_least(Stage::merge, merge_.busy);
  at_least(Stage::spill, spill_.busy);
  at_least(Stage::write, write_.busy);
  for (double& busy : result.busy) busy *= of_followed;
  result.seconds = costs_.start_seconds + end * of_followed;
  return result;
}

}  // namespace

Prediction predict(const Plan& plan, const Costs& costs, InputKind inputs, std::int64_t from) {
  return Timeline(plan, Demands(plan), costs, read_rate(costs, inputs)).run(from);
}

namespace {

// Of the time that a run takes with files of any speed.
constexpr double bound_from = 1.05;
constexpr double no_limit = 1e30;

// The plan's time with all files so many times as fast.
class FasterFiles {
 public:
  FasterFiles(const Plan& plan, const Costs& costs, InputKind inputs)
      : plan_(plan), demands_(plan), costs_(costs), inputs_(inputs) {}

  Prediction predict(double factor) const {
    Costs costs = costs_;
    costs.write *= factor;
    costs.rewrite *= factor;
    costs.read *= factor;
    costs.read_direct *= factor;
    return Timeline(plan_, demands_, costs, read_rate(costs, inputs_)).run(0);
  }

  // The least factor, to 2%, with which the run takes no longer than `seconds`.
  double reach(double seconds) const {
    double less = 1, enough = 2;
    for (; predict(enough).seconds > seconds && enough < no_limit; enough *= 2) less = enough;
    while (enough > 1.02 * less) {
      const double between = std::sqrt(less * enough);
      (predict(between).seconds > seconds ? less : enough) = between;
    }
    return enough;
  }

 private:
  const Plan& plan_;
  const Demands demands_;
  const Costs& costs_;
  const InputKind inputs_;
};

}  // namespace

std::optional<DiskBound> disk_bound(const Plan& plan, const Costs& costs, InputKind inputs) {
  const FasterFiles files(plan, costs, inputs);
  const Prediction now = files.predict(1);
  DiskBound disk;
  disk.seconds = now.seconds;
  disk.seconds_unbound = files.predict(no_limit).seconds;
  if (now.seconds <= bound_from * disk.seconds_unbound) return std::nullopt;
  const std::array<std::pair<Stage, double>, 3> stages = {
      {{Stage::read, inputs == InputKind::synthetic ? 0.0 : read_rate(costs, inputs)},
       {Stage::spill, spill_rate(costs)},
       {Stage::write, write_rate(plan, costs)}}};
  for (const auto& [stage, rate] : stages) {
    if (rate == 0 || now.busy_of(stage) <= disk.busy_seconds) continue;
    disk.stage = stage;
    disk.busy_seconds = now.busy_of(stage);
    disk.rate = rate;
  }
  disk.enough = disk.rate * files.reach(bound_from * disk.seconds_unbound);
  return disk;
}

}  // namespace stream_cqsa
