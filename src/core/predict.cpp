// The timeline of a plan: what each stage does when, by rates alone.
#include <algorithm>
#include <cmath>
#include <deque>

#include "core/plan_sizes.hpp"
#include "stream_cqsa/costs.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa {
namespace {

// Of work() of so many chunks in all: that of one quorum costs about its chunks.
constexpr std::int64_t examined_chunks = 1 << 17;
constexpr std::int64_t most_examined = 256;
// Of more subproblems the others are taken to go on like these.
constexpr std::int64_t most_followed = 1 << 20;

// What one quorum asks for, for each query head, or key/value head.
struct QuorumLoad {
  double scores = 0;        // live ones, of one query head
  double query_tokens = 0;  // of its live query chunks
  double key_tokens = 0;
  double query_chunks = 0;
  double key_chunks = 0;
};

QuorumLoad load_of(const Problem& problem, const QuorumWork& work) {
  QuorumLoad load;
  std::vector<bool> query(work.chunks.size(), false), key(work.chunks.size(), false);
  for (const ChunkPair& pair : work.pairs) {
    const auto at_query = static_cast<std::size_t>(pair.query);
    const auto at_key = static_cast<std::size_t>(pair.key);
    load.scores += static_cast<double>(
        problem.live_scores(work.chunks[at_query].queries, work.chunks[at_key].keys));
    query[at_query] = key[at_key] = true;
  }
  for (std::size_t i = 0; i < work.chunks.size(); ++i) {
    if (query[i]) {
      load.query_tokens += static_cast<double>(work.chunks[i].queries.size());
      ++load.query_chunks;
    }
    if (key[i]) {
      load.key_tokens += static_cast<double>(work.chunks[i].keys.size());
      ++load.key_chunks;
    }
  }
  return load;
}

// The quorums of one head group. Of many, some stand for those up to the next.
class Sweep {
 public:
  explicit Sweep(const Plan& plan)
      : quorums_(plan.division.quorum_count()),
        examined_(plan.division.scheme() == Scheme::tiles
                      ? quorums_  // unlike each other, and of one pair each
                      : std::min(quorums_, std::clamp(examined_chunks / quorums_, std::int64_t{8},
                                                      most_examined))),
        finished_rows_(static_cast<std::size_t>(quorums_)),
        first_bytes_(static_cast<std::size_t>(quorums_)) {
    examine_quorums(plan);
    examine_chunks(plan);
  }

  const QuorumLoad& at(std::int64_t quorum) const {
    return loads_[static_cast<std::size_t>(quorum * examined_ / quorums_)];
  }
  /// Quorums with anything to compute.
  std::int64_t live_quorums() const { return live_ > 0 ? live_ : quorums_; }
  /// Query rows of one head whose last quorum this is.
  double finished_rows(std::int64_t quorum) const {
    return finished_rows_[static_cast<std::size_t>(quorum)];
  }
  /// Of all bytes of Q, K and V, those of chunks whose first quorum this is.
  double first_share(std::int64_t quorum) const {
    return first_bytes_[static_cast<std::size_t>(quorum)];
  }

 private:
  void examine_quorums(const Plan& plan) {
    for (std::int64_t i = 0; i < examined_; ++i) {
      loads_.push_back(load_of(plan.problem(), plan.division.work(i * quorums_ / examined_)));
    }
    double scores = 0;
    for (std::int64_t quorum = 0; quorum < quorums_; ++quorum) {
      scores += at(quorum).scores;
      live_ += at(quorum).scores > 0 ? 1 : 0;
    }
    const Problem& p = plan.problem();
    const auto live = static_cast<double>(p.live_scores({0, p.query_length}, {0, p.key_length}));
    // Where those examined have none, others have some, if any.
    for (QuorumLoad& load : loads_)
      load.scores =
          live * (scores > 0 ? load.scores / scores : 1.0 / static_cast<double>(quorums_));
  }

  void examine_chunks(const Plan& plan) {
    const Problem& p = plan.problem();
    double rows = 0, bytes = 0;
    const auto used_first = [&](const std::vector<std::int64_t>& by, Range tokens,
                                std::int64_t heads) {
      if (by.empty()) return;
      const auto size = static_cast<double>(tokens.size() * heads);
      first_bytes_[static_cast<std::size_t>(by.front())] += size;
      bytes += size;
    };
    const std::int64_t chunks = plan.division.chunk_count();
    const std::int64_t examined = std::min(chunks, examined_);
    for (std::int64_t i = 0; i < examined; ++i) {
      const Chunk chunk = plan.division.chunk(i * chunks / examined);
      const auto as_query = plan.division.quorums_of_query(chunk.index);
      used_first(as_query, chunk.queries, p.query_heads);
      used_first(plan.division.quorums_of_key(chunk.index), chunk.keys, 2 * p.kv_heads);
      if (as_query.empty()) continue;
      finished_rows_[static_cast<std::size_t>(as_query.back())] +=
          static_cast<double>(chunk.queries.size());
      rows += static_cast<double>(chunk.queries.size());
    }
    scale(finished_rows_, rows, static_cast<double>(p.query_length));
    scale(first_bytes_, bytes, 1);
  }

  // To a sum of `whole`, where there is anything.
  static void scale(std::vector<double>& numbers, double sum, double whole) {
    if (sum == 0) return;
    for (double& number : numbers) number *= whole / sum;
  }

  const std::int64_t quorums_;
  const std::int64_t examined_;  // quorums, and at most so many chunks
  std::vector<QuorumLoad> loads_;
  std::int64_t live_ = 0;
  std::vector<double> finished_rows_;
  std::vector<double> first_bytes_;
};

// What a subproblem asks of each stage.
struct Demand {
  double read_bytes = 0;
  double copied_bytes = 0;
  double new_chunks = 0;  // key chunks that are in no slot yet
  double key_chunks = 0;
  double query_chunks = 0;
  double flop = 0;
  double partial_bytes = 0;
  double finished_bytes = 0;   // of outputs
  double written_bytes = 0;    // of these, to new places in the files
  double rewritten_bytes = 0;  // with the rest of their rows, see rewrites()
};

class Demands {
 public:
  explicit Demands(const Plan& plan)
      : plan_(plan),
        problem_(plan.problem()),
        cut_(cut_of(plan.request, plan.division, groups())),
        traffic_(estimate_traffic(plan.request, cut_, plan.order, plan.device, layout(plan))),
        sweep_(plan),
        batch_(static_cast<double>(problem_.batch)),
        input_bytes_(batch_ * (bytes_of(problem_.query_length, problem_.query_heads) +
                               2 * bytes_of(problem_.key_length, problem_.kv_heads))),
        loads_(static_cast<double>(cut_.key_chunks) * traffic_.copied_in / input_bytes_) {}

  Demand of(const SubproblemKey& key) const {
    const QuorumLoad& load = sweep_.at(key.quorum);
    const HeadGroup& heads = plan_.groups[static_cast<std::size_t>(key.group)];
    const auto query_heads = static_cast<double>(heads.query_heads(problem_).size());
    const double sweeps = batch_ * static_cast<double>(groups());
    const double of_heads =
        static_cast<double>(heads.count * groups()) / static_cast<double>(problem_.kv_heads);
    Demand demand;
    demand.new_chunks = new_chunks(load, key.quorum);
    const double share = demand.new_chunks / loads_;
    demand.copied_bytes = traffic_.copied_in / sweeps * of_heads * share;
    demand.read_bytes = read_bytes(key, share);
    demand.key_chunks = load.key_chunks;
    demand.query_chunks = load.query_chunks;
    demand.flop = 4 * load.scores * query_heads * static_cast<double>(problem_.head_dim);
    demand.partial_bytes = load.query_tokens * query_heads *
                           static_cast<double>(softmax_state_bytes(1, problem_.head_dim));
    demand.finished_bytes = sweep_.finished_rows(key.quorum) * query_heads *
                            static_cast<double>(problem_.head_dim * size_of(problem_.output_dtype) +
                                                (plan_.request.lse ? 4 : 0));
    (rewrites(key.group) ? demand.rewritten_bytes : demand.written_bytes) =
        demand.finished_bytes * (rewrites(key.group) ? static_cast<double>(groups()) : 1.0);
    return demand;
  }

 private:
  std::int64_t groups() const { return static_cast<std::int64_t>(plan_.groups.size()); }

  static HostLayout layout(const Plan& plan) {
    return {plan.host,
            plan.placement,
            plan.scratch_bytes,
            plan.query_block_tokens,
            plan.key_block_tokens,
            plan.piece_tokens};
  }

  double bytes_of(std::int64_t tokens, std::int64_t heads) const {
    return static_cast<double>(tokens) *
           static_cast<double>(heads * problem_.head_dim * size_of(storage_type(problem_.dtype)));
  }

  // Of a sweep's chunk loads the first quorum has its own chunks, the others share the rest.
  double new_chunks(const QuorumLoad& load, std::int64_t quorum) const {
    if (quorum == 0) return load.key_chunks;
    return std::max(0.0, loads_ - load.key_chunks) /
           static_cast<double>(std::max<std::int64_t>(sweep_.live_quorums() - 1, 1));
  }

  // Everything is read once, by the first quorum that uses it: in bshd by the first head group, as
  // token rows hold all heads. What is not kept is read again, as chunks are loaded again.
  double read_bytes(const SubproblemKey& key, double share) const {
    const bool by_rows = plan_.request.query.layout == Layout::bshd;
    const auto all = static_cast<double>(groups());
    const double once = std::min(input_bytes_, traffic_.read) / batch_;
    const double first = !by_rows ? once / all : key.group == 0 ? once : 0.0;
    const double again = (traffic_.read / batch_ - once) / all;
    return first * sweep_.first_share(key.quorum) + again * share;
  }

  // Where a row's heads come in several groups they are staged, and the last of them puts the whole
  // row where it belongs.
  bool rewrites(std::int64_t group) const {
    return plan_.request.output_layout == Layout::bshd && groups() > 1 && group + 1 == groups();
  }

  const Plan& plan_;
  const Problem& problem_;
  const Cut cut_;
  const Traffic traffic_;
  const Sweep sweep_;
  const double batch_;
  const double input_bytes_;
  const double loads_;  // of key chunks in a sweep
};

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
  void add(double end) {
    constexpr std::size_t most = 64;
    ends_.push_front(end);
    if (ends_.size() > most) ends_.pop_back();
  }
  // Of the one `back` before the next; from the start where there was none.
  double before(std::int64_t back) const {
    const auto at = static_cast<std::size_t>(back - 1);
    return at < ends_.size() ? ends_[at] : 0.0;
  }

 private:
  std::deque<double> ends_;
};

struct Worker {
  Lane copy_in, compute, copy_out;
  Ends computed, copied_out;
  double flop = 0;
  double launches = 0;
};

class Timeline {
 public:
  Timeline(const Plan& plan, const Costs& costs, InputKind inputs)
      : plan_(plan),
        costs_(costs),
        kernel_(kernel_cost(costs, plan.problem())),
        demands_(plan),
        workers_(static_cast<std::size_t>(plan.request.workers)),
        read_rate_(inputs == InputKind::files ? costs.read : costs.generate),
        on_device_(plan.placement == AccumulatorPlacement::device) {}

  Prediction run() {
    const std::int64_t count = plan_.subproblem_count();
    const std::int64_t followed = std::min(count, most_followed);
    for (std::int64_t id = 0; id < followed; ++id) {
      const SubproblemKey key = plan_.key(id);
      const Demand demand = demands_.of(key);
      if (!(demand.flop > 0)) continue;  // nothing of it is ever loaded
      Worker& worker = worker_of(key);
      deliver(worker, demand, compute(worker, demand, load(worker, demand)));
    }
    return prediction(followed > 0 ? static_cast<double>(count) / static_cast<double>(followed)
                                   : 1);
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
  const Demands demands_;
  Lane read_, receive_, merge_, write_;
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
  if (!on_device_) out = merge_.run(out, bytes / costs_.merge);
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
  at_least(Stage::write, write_.busy);
  for (double& busy : result.busy) busy *= of_followed;
  result.seconds = costs_.start_seconds + end * of_followed;
  return result;
}

}  // namespace

Prediction predict(const Plan& plan, const Costs& costs, InputKind inputs) {
  return Timeline(plan, costs, inputs).run();
}

}  // namespace stream_cqsa
