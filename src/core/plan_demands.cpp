#include "core/plan_demands.hpp"

#include <algorithm>

#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa {
namespace {

// Of work() of so many chunks in all: that of one quorum costs about its chunks.
constexpr std::int64_t examined_chunks = 1 << 17;
constexpr std::int64_t most_examined = 256;

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

}  // namespace

// The quorums of one head group. Of many, some stand for those up to the next.
class Demands::Sweep {
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

Demands::Demands(const Plan& plan)
    : plan_(plan),
      problem_(plan.problem()),
      cut_(cut_of(plan)),
      traffic_(estimate_traffic(plan)),
      sweep_(std::make_unique<const Sweep>(plan)),
      batch_(static_cast<double>(problem_.batch)),
      input_bytes_(batch_ * (bytes_of(problem_.query_length, problem_.query_heads) +
                             2 * bytes_of(problem_.key_length, problem_.kv_heads))),
      loads_(static_cast<double>(cut_.key_chunks) * traffic_.copied_in / input_bytes_),
      entry_reads_(traffic_.read / batch_),
      rest_reads_(estimate_reads(plan, groups() - plan.groups_done % groups())),
      first_reads_(estimate_reads(plan, 1)) {}

Demands::~Demands() = default;

Demand Demands::of(const SubproblemKey& key) const {
  const QuorumLoad& load = sweep_->at(key.quorum);
  const HeadGroup& heads = plan_.groups[static_cast<std::size_t>(key.group)];
  const auto query_heads = static_cast<double>(heads.query_heads(problem_).size());
  const double sweeps = batch_ * static_cast<double>(groups());
  const double of_heads =
      static_cast<double>(heads.count * groups()) / static_cast<double>(problem_.kv_heads);
  Demand demand;
  demand.new_chunks = new_chunks(load.key_chunks, key.quorum);
  const double share = demand.new_chunks / loads_;
  demand.copied_bytes = traffic_.copied_in / sweeps * of_heads * share;
  demand.read_bytes = read_bytes(key, share);
  demand.key_chunks = load.key_chunks;
  demand.query_chunks = load.query_chunks;
  demand.query_bytes =
      load.query_tokens * query_heads *
      static_cast<double>(problem_.head_dim * size_of(storage_type(problem_.dtype)));
  demand.flop = 4 * load.scores * query_heads * static_cast<double>(problem_.head_dim);
  demand.partial_bytes = load.query_tokens * query_heads *
                         static_cast<double>(softmax_state_bytes(1, problem_.head_dim));
  demand.spilled_bytes = demand.partial_bytes * traffic_.spilled / traffic_.copied_out;
  demand.finished_bytes = sweep_->finished_rows(key.quorum) * query_heads *
                          static_cast<double>(problem_.head_dim * size_of(problem_.output_dtype) +
                                              (plan_.request.lse ? 4 : 0));
  (rewrites(key.group) ? demand.rewritten_bytes : demand.written_bytes) =
      demand.finished_bytes * (rewrites(key.group) ? static_cast<double>(groups()) : 1.0);
  return demand;
}

double Demands::bytes_of(std::int64_t tokens, std::int64_t heads) const {
  return static_cast<double>(tokens) *
         static_cast<double>(heads * problem_.head_dim * size_of(storage_type(problem_.dtype)));
}

// Of a sweep's chunk loads the first quorum has its own chunks, the others share the rest.
double Demands::new_chunks(double key_chunks, std::int64_t quorum) const {
  if (quorum == 0) return key_chunks;
  return std::max(0.0, loads_ - sweep_->at(0).key_chunks) /
         static_cast<double>(std::max<std::int64_t>(sweep_->live_quorums() - 1, 1));
}

// Of a batch entry that is not done.
std::int64_t Demands::first_group(std::int64_t batch) const {
  return batch == plan_.groups_done / groups() ? plan_.groups_done % groups() : 0;
}

// Everything is read once, by the first quorum that uses it: in bshd by the first head group, as
// token rows hold all heads. What is not kept is read again, as chunks are loaded again, and there
// by every other head group.
double Demands::read_bytes(const SubproblemKey& key, double share) const {
  const bool by_rows = plan_.request.query.layout == Layout::bshd;
  const std::int64_t begin = first_group(key.batch);
  const auto computed = static_cast<double>(groups() - begin);
  const double reads = begin == 0 ? entry_reads_ : rest_reads_;
  const double all = by_rows ? 1.0 : computed / static_cast<double>(groups());
  double once = std::min(all * input_bytes_ / batch_, reads);
  double again = (reads - once) / computed;
  if (by_rows && plan_.order == ScheduleOrder::groups_outer && computed > 1) {
    once = std::min(once, first_reads_);
    again = key.group == begin ? first_reads_ - once : (reads - first_reads_) / (computed - 1);
  }
  const double first = !by_rows ? once / computed : key.group == begin ? once : 0.0;
  return first * sweep_->first_share(key.quorum) + again * share;
}

bool Demands::rewrites(std::int64_t group) const {
  return puts_rows_in_order(plan_.request, groups()) && group + 1 == groups();
}

}  // namespace stream_cqsa
