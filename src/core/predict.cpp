// The timeline of a plan: what each stage does when, by rates alone.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <queue>
#include <set>
#include <utility>
#include <vector>

#include "core/plan_demands.hpp"
#include "core/plan_search.hpp"
#include "stream_cqsa/costs.hpp"

namespace stream_cqsa {
namespace {

// Of more subproblems the others are taken to go on like these.
constexpr std::int64_t most_followed = 1 << 20;

// Of outputs.
double write_rate(const Plan& plan, const Costs& costs) {
  const auto groups = static_cast<double>(plan.groups.size());
  if (!puts_rows_in_order(plan.request, static_cast<std::int64_t>(plan.groups.size())))
    return costs.write;
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
  Worker(const Costs& own, const Problem& problem)
      : costs(own), kernel(kernel_cost(own, problem)) {}

  const Costs& costs;
  const KernelCost& kernel;
  Lane copy_in, compute, copy_out;
  Ends computed, copied_out;
  double flop = 0;
  double launches = 0;
  Demand last;  // that it has computed
  std::size_t kind = 0;
};

const Costs& costs_of_worker(const SharedCosts& costs, std::size_t worker) {
  return costs.workers.empty() ? costs.merging : costs.workers[worker];
}

std::size_t count_workers(const Plan& plan, const SharedCosts& costs) {
  return costs.workers.empty() ? static_cast<std::size_t>(plan.request.workers)
                               : costs.workers.size();
}

/// The workers, by how fast they are: of those that are about alike the one that is free first is
/// taken to be done first, so that few are looked at for each subproblem.
class Crowd {
 public:
  Crowd(const Plan& plan, const SharedCosts& costs) {
    const std::size_t count = count_workers(plan, costs);
    workers_.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      Worker& worker = workers_.emplace_back(costs_of_worker(costs, i), plan.problem());
      worker.kind = kind_of(worker);
      kinds_[worker.kind].free.emplace(0, i);
    }
  }

  const std::vector<Worker>& all() const { return workers_; }

  // By computing or copying in alone. Nobody takes what a faster one would be done with before:
  // near the end that repeats it, see Dispatcher::next().
  Worker& first_done(const Demand& demand) {
    std::pair<double, std::size_t> first(std::numeric_limits<double>::infinity(), 0);
    for (const Kind& kind : kinds_) {
      const auto& [free, number] = *kind.free.begin();
      const double seconds =
          std::max(demand.flop / kind.flop_per_second, demand.copied_bytes / kind.copy_in);
      first = std::min(first, {free + seconds, number});
    }
    return workers_[first.second];
  }

  // When the worker will have computed.
  double run(Worker& worker, double ready, double seconds) {
    auto& free = kinds_[worker.kind].free;
    const auto number = static_cast<std::size_t>(&worker - workers_.data());
    free.erase({worker.compute.free, number});
    const double end = worker.compute.run(ready, seconds);
    free.emplace(end, number);
    return end;
  }

 private:
  struct Kind {
    double flop_per_second = 0;
    double copy_in = 0;
    std::set<std::pair<double, std::size_t>> free;  // from when on each is, and its number
  };

  std::size_t kind_of(const Worker& worker) {
    const double rate = worker.kernel.flop_per_second, copy_in = worker.costs.copy_in;
    std::size_t kind = 0;
    while (kind < kinds_.size() && !(are_alike(kinds_[kind].flop_per_second, rate) &&
                                     are_alike(kinds_[kind].copy_in, copy_in)))
      ++kind;
    if (kind == kinds_.size()) kinds_.push_back({rate, copy_in, {}});
    return kind;
  }

  // As measured rates are of devices of one kind.
  static bool are_alike(double a, double b) { return std::max(a, b) <= 1.05 * std::min(a, b); }

  std::vector<Worker> workers_;
  std::vector<Kind> kinds_;
};

class Timeline {
 public:
  Timeline(const Plan& plan, const Demands& demands, const SharedCosts& costs, InputKind inputs)
      : plan_(plan),
        costs_(costs.merging),
        demands_(demands),
        inputs_(inputs),
        on_device_(plan.placement == AccumulatorPlacement::device),
        crowd_(plan, costs),
        sends_(!costs.workers.empty() || plan.request.workers > 1) {}

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
      Worker& worker = worker_of(key, demand);
      const double loaded = load(worker, demand);
      deliver_until(worker.compute.free);
      compute(worker, demand, loaded);
      worker.last = demand;
      undelivered_.emplace(worker.compute.free, &worker);
    }
    deliver_until(std::numeric_limits<double>::infinity());
    return prediction(followed > 0 ? static_cast<double>(left) / static_cast<double>(followed) : 1);
  }

 private:
  // Of whole head groups where these are merged on the workers' devices.
  Worker& worker_of(const SubproblemKey& key, const Demand& demand) {
    if (!on_device_) return crowd_.first_done(demand);
    const std::int64_t group = group_number(plan_, key.batch, key.group);
    if (group != group_) {
      const Problem& problem = plan_.problem();
      const HeadGroup& heads = plan_.groups[static_cast<std::size_t>(key.group)];
      Demand whole = demand;
      whole.flop = flop_of(problem) * static_cast<double>(heads.count) /
                   static_cast<double>(problem.batch * problem.kv_heads);
      taker_ = &crowd_.first_done(whole);
      group_ = group;
    }
    return *taker_;
  }

  // What has been computed by then, in this order.
  void deliver_until(double time) {
    for (; !undelivered_.empty() && undelivered_.top().first <= time; undelivered_.pop()) {
      const auto& [computed, worker] = undelivered_.top();
      deliver(*worker, worker->last, computed);
    }
  }

  // Launches of one subproblem.
  double parts_of(const Demand& demand) const {
    const auto chunks = static_cast<std::int64_t>(demand.query_chunks);
    const std::int64_t at_once = plan_.device.queries_at_once(chunks);
    return at_once < chunks ? std::ceil(demand.query_chunks / static_cast<double>(at_once)) : 1.0;
  }

  // Of the queries and partials of what is computed in parts: those that are copied between two of
  // its launches where the only slot is that of one of them.
  double share_in_turn(const Demand& demand) const {
    const bool one = std::min(plan_.device.query_slots, plan_.device.state_slots) == 1;
    return one ? 1 - 1 / parts_of(demand) : 0.0;
  }

  double load(Worker& worker, const Demand& demand);
  void compute(Worker& worker, const Demand& demand, double loaded);
  void deliver(Worker& worker, const Demand& demand, double computed);
  Prediction prediction(double of_followed) const;

  const Plan& plan_;
  const Costs& costs_;  // of the rank that merges
  const Demands& demands_;
  Lane read_, receive_, spill_, merge_, write_;
  // When workers end what they have computed last, and who; the first on top.
  using Ending = std::pair<double, Worker*>;
  std::priority_queue<Ending, std::vector<Ending>, std::greater<>> undelivered_;
  const InputKind inputs_;
  const bool on_device_;
  Crowd crowd_;
  const bool sends_;  // to another rank, which merges
  // Who has the head group that was taken last.
  Worker* taker_ = nullptr;
  std::int64_t group_ = -1;
};

// Reads and copies in; when the subproblem's chunks are there. Each worker reads about everything,
// all at the same time: one lane stands for all of theirs.
double Timeline::load(Worker& worker, const Demand& demand) {
  const double read = read_.run(0, demand.read_bytes / read_rate(worker.costs, inputs_));
  const double in_turn = std::min(demand.copied_bytes, share_in_turn(demand) * demand.query_bytes);
  const double seconds = (demand.copied_bytes - in_turn) / worker.costs.copy_in;
  worker.copy_in.busy += in_turn / worker.costs.copy_in;
  // New chunks take the place of those of the subproblem before, which must have been computed, as
  // far as there are no slots beside.
  const double beside = static_cast<double>(plan_.device.kv_slots) - demand.key_chunks;
  const double ahead = std::clamp(beside / std::max(demand.new_chunks, 1.0), 0.0, 1.0);
  double copied = worker.copy_in.run(worker.computed.before(ahead < 1 ? 2 : 3), seconds);
  copied = std::max(copied, worker.computed.before(1) + (1 - ahead) * seconds);
  if (demand.read_bytes > 0) copied = std::max(copied, read);
  return worker.copy_in.free = copied;
}

void Timeline::compute(Worker& worker, const Demand& demand, double loaded) {
  // Of all that the worker has computed so far: clocks depend on what came before.
  const double before = kernel_seconds(worker.kernel, worker.flop, worker.launches);
  worker.flop += demand.flop;
  worker.launches += parts_of(demand);
  double seconds = kernel_seconds(worker.kernel, worker.flop, worker.launches) - before;
  double emptied = 0;
  if (on_device_) {
    if (plan_.division.most_partials() > 1)
      seconds += demand.partial_bytes / worker.costs.device_merge;
  } else {
    const double sets =
        static_cast<double>(plan_.device.state_slots) / std::max(demand.query_chunks, 1.0);
    emptied = worker.copied_out.before(std::max<std::int64_t>(1, static_cast<std::int64_t>(sets)));
  }
  const double waits = share_in_turn(demand) * (demand.query_bytes / worker.costs.copy_in +
                                                demand.partial_bytes / worker.costs.copy_out);
  worker.computed.add(crowd_.run(worker, std::max(loaded, emptied), seconds + waits));
  worker.compute.busy -= waits;
}

void Timeline::deliver(Worker& worker, const Demand& demand, double computed) {
  const double bytes = on_device_ ? demand.finished_bytes : demand.partial_bytes;
  // Copies out wait for the buffers that merging empties.
  const auto buffers =
      static_cast<double>(plan_.host.state_buffers * plan_.host.state_buffer_bytes);
  const double room = on_device_ ? 0.0 : merge_.free - buffers / costs_.merge;
  const double in_turn = on_device_ ? 0.0 : share_in_turn(demand) * bytes;
  worker.copy_out.busy += in_turn / worker.costs.copy_out;
  double out =
      worker.copy_out.run(std::max(computed, room), (bytes - in_turn) / worker.costs.copy_out);
  worker.copied_out.add(out);
  if (sends_) out = receive_.run(out, bytes / costs_.receive);
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
  for (const Worker& worker : crowd_.all()) {
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

Prediction predict(const Plan& plan, const SharedCosts& costs, InputKind inputs,
                   std::int64_t from) {
  return Timeline(plan, Demands(plan), costs, inputs).run(from);
}

Prediction predict(const Plan& plan, const Costs& costs, InputKind inputs, std::int64_t from) {
  return predict(plan, SharedCosts{costs, {}}, inputs, from);
}

namespace {

// Of the time that a run takes with files of any speed.
constexpr double bound_from = 1.05;
constexpr double no_limit = 1e30;

// The plan's time with all files so many times as fast.
class FasterFiles {
 public:
  FasterFiles(const Plan& plan, const SharedCosts& costs, InputKind inputs)
      : plan_(plan), demands_(plan), costs_(costs), inputs_(inputs) {}

  Prediction predict(double factor) const {
    SharedCosts costs = costs_;
    speed_up(costs.merging, factor);
    for (Costs& worker : costs.workers) speed_up(worker, factor);
    return Timeline(plan_, demands_, costs, inputs_).run(0);
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
  static void speed_up(Costs& costs, double factor) {
    costs.write *= factor;
    costs.rewrite *= factor;
    costs.read *= factor;
    costs.read_direct *= factor;
  }

  const Plan& plan_;
  const Demands demands_;
  const SharedCosts& costs_;
  const InputKind inputs_;
};

// Of the slowest worker's files; 0 where there are none.
double file_read_rate(const Plan& plan, const SharedCosts& costs, InputKind inputs) {
  if (inputs == InputKind::synthetic) return 0;
  double slowest = no_limit;
  for (std::size_t i = 0; i < count_workers(plan, costs); ++i)
    slowest = std::min(slowest, read_rate(costs_of_worker(costs, i), inputs));
  return slowest;
}

}  // namespace

std::optional<DiskBound> disk_bound(const Plan& plan, const SharedCosts& costs, InputKind inputs) {
  const FasterFiles files(plan, costs, inputs);
  const Prediction now = files.predict(1);
  DiskBound disk;
  disk.seconds = now.seconds;
  disk.seconds_unbound = files.predict(no_limit).seconds;
  if (now.seconds <= bound_from * disk.seconds_unbound) return std::nullopt;
  const std::array<std::pair<Stage, double>, 3> stages = {
      {{Stage::read, file_read_rate(plan, costs, inputs)},
       {Stage::spill, spill_rate(costs.merging)},
       {Stage::write, write_rate(plan, costs.merging)}}};
  for (const auto& [stage, rate] : stages) {
    if (rate == 0 || now.busy_of(stage) <= disk.busy_seconds) continue;
    disk.stage = stage;
    disk.busy_seconds = now.busy_of(stage);
    disk.rate = rate;
  }
  disk.enough = disk.rate * files.reach(bound_from * disk.seconds_unbound);
  return disk;
}

std::optional<DiskBound> disk_bound(const Plan& plan, const Costs& costs, InputKind inputs) {
  return disk_bound(plan, SharedCosts{costs, {}}, inputs);
}

}  // namespace stream_cqsa
