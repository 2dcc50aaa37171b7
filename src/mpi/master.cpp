#include "mpi/master.hpp"

#include <fmt/format.h>

#include <list>
#include <mutex>

#include "engine/assembler.hpp"
#include "engine/buffer.hpp"
#include "engine/dispatcher.hpp"
#include "engine/monitor.hpp"
#include "mpi/intake.hpp"
#include "mpi/poll.hpp"
#include "mpi/protocol.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

// One that computes, one whose inputs are on their way, one whose partials are.
constexpr int ahead = 3;

// Pieces of the subproblem that has most of them.
std::int64_t most_pieces(const Plan& plan) {
  const Range longest = plan.division.chunk(plan.division.chunk_count() - 1).queries;
  std::int64_t pieces = piece_count(plan, longest);
  for (std::int64_t chunk = 0; chunk < plan.division.chunk_count(); ++chunk)
    pieces = std::max(pieces, piece_count(plan, plan.division.chunk(chunk).queries));
  return pieces * plan.division.quorum_size();
}

Dispatcher::Options dispatch_options(const Plan& plan) {
  Dispatcher::Options options;
  options.ahead = ahead;
  // One buffer is left for partials that are merged as they come, and one for those dropped.
  options.window = (plan.host.state_buffers - 2) / most_pieces(plan);
  options.chunks_kept = plan.device.kv_slots;
  return options;
}

/// Subproblems whose pieces merge threads have merged, for the communication thread.
class Merged {
 public:
  void add(std::int64_t subproblem) {
    const std::scoped_lock lock(mutex_);
    subproblems_.push_back(subproblem);
  }
  std::vector<std::int64_t> take() {
    const std::scoped_lock lock(mutex_);
    return std::exchange(subproblems_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<std::int64_t> subproblems_;
};

/// The communication thread's work.
class Master {
 public:
  Master(const Plan& plan, Assembler& assembler, Merged& merged, const Abort& abort,
         Telemetry& telemetry, Communicator& communicator)
      : merged_(merged),
        abort_(abort),
        telemetry_(telemetry),
        communicator_(communicator),
        dispatcher_(plan, communicator.size() - 1, dispatch_options(plan),
                    [&](const SubproblemKey& key, std::int64_t chunk) {
                      return assembler.lacking_pieces(key, chunk);
                    }),
        intake_(plan, assembler, dispatcher_, communicator, telemetry),
        ended_(static_cast<std::size_t>(communicator.size() - 1), false) {
    result_.failures.resize(ended_.size());
    result_.subproblems.resize(ended_.size());
    listen();
  }

  /// Until everything is merged, or something has failed: then nothing more can be done.
  void work() {
    while (!dispatcher_.all_merged() && !abort_.failed()) {
      if (dispatcher_.workers_left() == 0) throw Error(nobody_left());
      step([this] { return assign(); });
    }
  }
  /// Stops the workers and waits until they have ended.
  void end() {
    intake_.drop_all();
    Message stop;
    stop.said = Said::stop;
    for (int worker = 0; worker < workers(); ++worker) {
      if (!ended_[static_cast<std::size_t>(worker)]) send(worker, stop);
    }
    while (!all_ended() || !sends_.empty() || intake_.under_way()) {
      step([] { return false; });
    }
    // Where the last one to end was lost, one more message is waited for.
    incoming_request_.cancel();
    while (!incoming_request_.settled()) {
    }
    result_.repeated = dispatcher_.repeated();
  }
  MasterResult& result() { return result_; }
  /// When the first worker's work began, now_seconds().
  double began() const { return began_; }

 private:
  struct Sending {
    Message message;
    Request request;
  };
  int workers() const { return static_cast<int>(ended_.size()); }
  bool all_ended() const { return std::find(ended_.begin(), ended_.end(), false) == ended_.end(); }

  template <typename Assign>
  void step(const Assign& assign) {
    const double begin = now_seconds();
    bool did_something = false;
    for (const std::int64_t id : merged_.take()) {
      dispatcher_.merged_piece(id);
      did_something = true;
    }
    for (; !all_ended() && receive(); did_something = true) {
    }
    did_something |= intake_.poll();
    did_something |= assign();
    sends_.remove_if([](Sending& sending) { return sending.request.settled(); });
    if (did_something) result_.dispatch_seconds += now_seconds() - begin;
    pause_.after(did_something, intake_.under_way() || !sends_.empty());
  }

  void listen() {
    incoming_request_ = communicator_.receive(MPI_ANY_SOURCE, to_master_tag, incoming_.bytes());
  }

  // False where no message has come and no rank is lost.
  bool receive() {
    const Request::State state = incoming_request_.test(source_);
    if (state == Request::State::pending) return false;
    if (state == Request::State::lost) {
      for (const int rank : communicator_.newly_lost()) lose(rank);
      return true;
    }
    hear(source_, incoming_);
    if (!all_ended()) listen();
    return true;
  }

  void lose(int rank) {
    const auto worker = static_cast<std::size_t>(rank - 1);
    if (result_.failures[worker].empty()) result_.failures[worker] = lost_text;
    fmt::print(stderr, "stream-cqsa: rank {} was lost{}\n", rank,
               dispatcher_.all_merged() ? "" : "; its work goes to the others");
    ended_[worker] = true;
    dispatcher_.lost(rank - 1, true);
    intake_.forget(rank);
  }

  void hear(int rank, const Message& message) {
    if (communicator_.is_lost(rank)) return;
    const int worker = rank - 1;
    switch (message.said) {
      case Said::ready:
        if (began_ == 0) began_ = now_seconds();
        return;
      case Said::offer:
        return intake_.offer(rank, message);
      case Said::computed:
        ++result_.subproblems[static_cast<std::size_t>(worker)];
        telemetry_.add_subproblem();
        dispatcher_.computed(worker, message.subproblem);
        return intake_.computed(rank, message.subproblem, message.count);
      case Said::failed:
        result_.failures[static_cast<std::size_t>(worker)] = message.text.data();
        fmt::print(stderr, "stream-cqsa: rank {} gave up: {}; its work goes to the others\n", rank,
                   message.text.data());
        return dispatcher_.lost(worker, false);
      case Said::ended:
        ended_[static_cast<std::size_t>(worker)] = true;
        return;
      case Said::assign:
      case Said::stop:
        break;
    }
    throw Error(fmt::format("rank {} sent a message that only the master sends", rank));
  }

  // Gives each worker what it may have.
  bool assign() {
    bool did_something = false;
    for (int worker = 0; worker < workers(); ++worker) {
      while (const auto order = dispatcher_.next(worker)) {
        intake_.drop(worker + 1, order->abandon);
        Message message;
        message.said = Said::assign;
        message.subproblem = order->assignment.id;
        message.set_wanted(order->assignment.wanted);
        send(worker, message);
        did_something = true;
      }
    }
    return did_something;
  }

  void send(int worker, const Message& message) {
    Sending& sending = sends_.emplace_back(Sending{message, {}});
    sending.request = communicator_.send(worker + 1, to_worker_tag, sending.message.bytes());
  }

  std::string nobody_left() const {
    const auto first = std::find_if(result_.failures.begin(), result_.failures.end(),
                                    [](const std::string& text) { return !text.empty(); });
    return fmt::format("no worker is left; rank {} failed with: {}",
                       first - result_.failures.begin() + 1, *first);
  }

  Merged& merged_;
  const Abort& abort_;
  Telemetry& telemetry_;
  Communicator& communicator_;
  Dispatcher dispatcher_;
  Intake intake_;
  std::vector<bool> ended_;
  std::list<Sending> sends_;
  Message incoming_;
  Request incoming_request_;
  int source_ = 0;
  Pause pause_;
  double began_ = 0;
  MasterResult result_;
};

}  // namespace

MasterResult run_master(const Plan& plan, const Outputs& outputs, const RunOptions& options,
                        Telemetry& telemetry, Communicator& communicator,
                        const std::function<void()>& ready) {
  check_outputs(plan, outputs);
  const HostBuffer memory(plan.host.bytes());
  Abort abort;
  Merged merged;
  Assembler assembler(plan, outputs, memory.data(), options, telemetry, abort);
  assembler.on_merged([&](std::int64_t subproblem) { merged.add(subproblem); });
  assembler.tell_resumed();
  ready();
  Master master(plan, assembler, merged, abort, telemetry, communicator);
  {
    Crew crew(abort);
    try {
      try {
        assembler.start(crew);
        master.work();
      } catch (...) {
        abort.fail();
      }
      assembler.end_of_partials();
      master.end();
    } catch (const std::exception& error) {
      // Workers can no longer be told, and MPI may still write into what this would free.
      communicator.abort(fmt::format("rank 0: {}", error.what()));
    }
    crew.join();
  }
  abort.rethrow_if_failed();

  MasterResult result = std::move(master.result());
  result.run.seconds = now_seconds() - master.began();
  result.run.merged_scores = assembler.merged_scores();
  result.run.output = assembler.non_finite();
  result.run.host_bytes = memory.bytes();
  result.run.scratch_bytes = assembler.scratch_bytes();
  result.run.checkpoint = assembler.checkpoint_totals();
  return result;
}

}  // namespace stream_cqsa
