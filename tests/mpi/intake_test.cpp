// What a lost rank leaves behind: rank 1 takes work and offers partials that never come, and the
// run comes to its bytes without it. No rank need be lost for that.
#define BOOST_TEST_MODULE mpi_intake
#include "mpi/intake.hpp"

#include <boost/test/unit_test.hpp>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <random>

#include "engine/buffer.hpp"
#include "engine/dispatcher.hpp"
#include "engine/monitor.hpp"
#include "mpi/worker.hpp"
#include "support/attention.hpp"
#include "support/mpi_world.hpp"
#include "support/run_plan.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_TEST_GLOBAL_FIXTURE(MpiWorld);

namespace {

constexpr int silent_rank = 1;

void wait(Request& request) {
  while (!request.done()) std::this_thread::yield();
}

void send(int to, int tag, const Message& message) {
  Request request = world().send(to, tag, message.bytes());
  wait(request);
}

/// Offers what it is asked for, up to some partial of some subproblem; then says `ended`, which
/// stands for its loss, and nothing more.
class SilentWorker {
 public:
  SilentWorker(const Plan& plan, std::uint64_t seed) : plan_(plan), random_(seed) {
    std::int64_t with_work = 0;
    for (std::int64_t id = 0; id < plan.subproblem_count(); ++id)
      with_work += plan.work(id).pairs.empty() ? 0 : 1;
    // It gets three at once, if there are as many.
    subproblems_ =
        1 + static_cast<int>(random_() % 3) %
                static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(3, with_work)));
  }

  void work() {
    for (Message message;;) {
      Request request = world().receive(0, to_worker_tag, message.bytes());
      wait(request);
      if (message.said == Said::stop) return;
      if (subproblems_ > 0) offer(message);
    }
  }

 private:
  void offer(const Message& order) {
    const QuorumWork work = plan_.work(order.subproblem);
    const auto [batch, group, quorum] = plan_.key(order.subproblem);
    const std::vector<bool> wanted = order.wanted_positions();
    std::vector<PieceKey> keys;
    for (std::size_t query = 0; query < work.chunks.size(); ++query) {
      const Chunk& chunk = work.chunks[query];
      for (std::int64_t piece = 0; wanted[query] && piece < piece_count(plan_, chunk.queries);
           ++piece)
        keys.push_back({batch, group, chunk.index, piece});
    }
    Message message;
    message.subproblem = order.subproblem;
    message.order = order.order;
    message.count = static_cast<std::int64_t>(keys.size());
    const bool last = --subproblems_ == 0;
    if (last) keys.resize(random_() % (keys.size() + 1));
    for (const PieceKey& key : keys) {
      message.said = Said::offer;
      message.piece = key;
      message.buffer = buffers_++;
      send(0, to_master_tag, message);
    }
    message.said = last ? Said::ended : Said::computed;
    send(0, to_master_tag, message);
  }

  const Plan& plan_;
  std::mt19937_64 random_;
  int subproblems_ = 0;
  std::int32_t buffers_ = 0;
};

/// The master's part, of the pieces that it is made of.
class SmallMaster {
 public:
  SmallMaster(const Plan& plan, const Outputs& outputs)
      : plan_(plan),
        memory_(plan.host.bytes()),
        assembler_(plan, outputs, memory_.data(), options_, telemetry_, abort_),
        dispatcher_(plan, world().size() - 1, dispatch_options(),
                    [&](const SubproblemKey& key, std::int64_t chunk) {
                      return assembler_.lacking_pieces(key, chunk);
                    }),
        intake_(plan, assembler_, world(), telemetry_,
                [this](const Source& source) {
                  dispatcher_.received(source.rank - 1, source.subproblem);
                }),
        left_(world().size() - 2) {
    assembler_.on_merged([&](std::int64_t subproblem) {
      const std::scoped_lock lock(mutex_);
      merged_.push_back(subproblem);
    });
  }

  void run() {
    Crew crew(abort_);
    assembler_.start(crew);
    listen();
    while (!dispatcher_.all_merged() && !abort_.failed()) step();
    assembler_.end_of_partials();
    intake_.drop_all();
    Message stop;
    stop.said = Said::stop;
    for (int rank = 1; rank < world().size(); ++rank) say(rank, stop);
    while (left_ > 0 || intake_.under_way() || !sends_.empty()) step();
    incoming_request_.cancel();
    while (!incoming_request_.settled()) {
    }
    crew.join();
    abort_.rethrow_if_failed();
  }
  /// State buffers that were given back.
  std::int64_t free_buffers() {
    std::int64_t count = 0;
    for (PartialReceiver::Buffer buffer; assembler_.try_buffer(buffer);) ++count;
    return count;
  }
  const std::vector<std::uint64_t>& merged_scores() const { return assembler_.merged_scores(); }

 private:
  struct Sending {
    Message message;
    Request request;
  };

  Dispatcher::Options dispatch_options() const {
    std::int64_t pieces = 1;
    for (std::int64_t chunk = 0; chunk < plan_.division.chunk_count(); ++chunk)
      pieces = std::max(pieces, piece_count(plan_, plan_.division.chunk(chunk).queries));
    return {(plan_.host.state_buffers - 2) / (pieces * plan_.division.quorum_size()), 3, 4};
  }

  void listen() {
    incoming_request_ = world().receive(MPI_ANY_SOURCE, to_master_tag, incoming_.bytes());
  }

  void say(int rank, const Message& message) {
    Sending& sending = sends_.emplace_back(Sending{message, {}});
    sending.request = world().send(rank, to_worker_tag, sending.message.bytes());
  }

  void step() {
    {
      const std::scoped_lock lock(mutex_);
      for (const std::int64_t id : std::exchange(merged_, {})) dispatcher_.merged_piece(id);
    }
    intake_.merged();
    for (int rank = 0; incoming_request_.done(rank); listen()) hear(rank);
    intake_.poll();
    for (int worker = 0; worker < world().size() - 1; ++worker) {
      while (const auto order = dispatcher_.next(worker)) {
        for (const std::int64_t id : order->abandon)
          intake_.drop({id, worker + 1, orders_.at({worker, id})});
        Message message;
        message.said = Said::assign;
        message.subproblem = order->assignment.id;
        message.order = orders_[{worker, message.subproblem}] = ++last_order_;
        message.set_wanted(order->assignment.wanted);
        say(worker + 1, message);
      }
    }
    sends_.remove_if([](Sending& sending) { return sending.request.done(); });
    std::this_thread::yield();
  }

  void hear(int rank) {
    if (incoming_.said == Said::offer) intake_.offer(rank, incoming_);
    if (incoming_.said == Said::computed) {
      dispatcher_.computed(rank - 1, incoming_.subproblem);
      intake_.computed(rank, incoming_);
    }
    if (incoming_.said != Said::ended) return;
    if (rank != silent_rank) {
      --left_;
      return;
    }
    dispatcher_.lost(rank - 1, true);
    intake_.forget(rank);
  }

  const Plan& plan_;
  RunOptions options_;
  Telemetry telemetry_;
  Abort abort_;
  const HostBuffer memory_;
  Assembler assembler_;
  Dispatcher dispatcher_;
  Intake intake_;
  std::map<std::pair<int, std::int64_t>, std::int64_t> orders_;  ///< by worker and subproblem
  std::int64_t last_order_ = 0;
  std::mutex mutex_;  // guards merged_
  std::vector<std::int64_t> merged_;
  Message incoming_;
  Request incoming_request_;
  std::list<Sending> sends_;
  int left_;  ///< workers that have not ended
};

Plan random_plan(std::mt19937_64& random, const Problem& problem, Layout layout,
                 std::uint64_t trial) {
  const auto backend = make_cpu_backend({1});
  PlanRequest request = roomy_request(problem, layout, *backend);
  random_division(request, {2, 3, 7, 13, 31}, random);
  request.workers = world().size() - 1;
  if (random() % 2) request.heads_per_group = 1;
  Plan plan = make_plan(request);
  if (trial % 2 == 0) return plan;
  // Not even the partials of one subproblem may come early.
  plan.host.state_buffers = 3;
  plan.request.host_budget = plan.host.bytes();
  return plan;
}

void check_master(const Plan& plan, const TestInput& input) {
  const Problem& problem = plan.problem();
  TensorDesc desc = input.query.desc;
  desc.name = "o";
  desc.dtype = problem.output_dtype;
  const TensorDesc lse = lse_desc(problem.batch, problem.query_heads, problem.query_length);
  std::vector<std::byte> output(static_cast<std::size_t>(desc.bytes()));
  std::vector<std::byte> lse_output(static_cast<std::size_t>(lse.bytes()));
  const auto output_sink = make_memory_sink(desc, output);
  const auto lse_sink = make_memory_sink(lse, lse_output);
  const Plan own = master_plan(plan, world().size() - 1);
  const Outputs outputs{*output_sink, lse_sink.get()};
  SmallMaster master(own, outputs);
  master.run();
  const auto backend = make_cpu_backend({1});
  const Outcome alone = run_plan(plan, input, *backend, true);
  BOOST_TEST(output == alone.output);
  BOOST_TEST(lse_output == alone.lse);
  BOOST_TEST(master.merged_scores() == expected_scores(plan));
  BOOST_TEST(master.free_buffers() == own.host.state_buffers - 1);  // one is for what is dropped
}

}  // namespace

BOOST_AUTO_TEST_CASE(what_a_lost_rank_offered_is_computed_again_and_its_buffers_are_free) {
  std::mt19937_64 random(21);
  for (std::uint64_t trial = 0; trial < trials<std::uint64_t>(40); ++trial) {
    // Rank 0 has ended the run before this one, and would take a message of this one for its own.
    world().broadcast("");
    const Problem problem = random_problem(random, 150, 24, 1);
    const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
    const Plan plan = random_plan(random, problem, layout, trial);
    const TestInput input = random_input(problem, layout, 2.0, random);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << plan.division.chunk_count()) {
      if (world().rank() == 0) {
        check_master(plan, input);
      } else if (world().rank() == silent_rank) {
        SilentWorker(plan, trial).work();
      } else {
        const auto backend = make_cpu_backend({1});
        Telemetry telemetry;
        const auto query = block_source(input.query), key = block_source(input.key),
                   value = block_source(input.value);
        const WorkerResult result =
            run_worker(plan, {plan.request.device_budget, plan.request.host_budget},
                       {*query, *key, *value}, *backend, RunOptions(), telemetry, world());
        BOOST_TEST(result.failure == "");
      }
    }
  }
}
