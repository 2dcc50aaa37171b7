#include "mpi/master_pass.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <optional>
#include <utility>

#include "engine/assembler.hpp"
#include "engine/buffer.hpp"
#include "engine/checkpoint.hpp"
#include "engine/dispatcher.hpp"
#include "engine/monitor.hpp"
#include "engine/passes.hpp"
#include "mpi/endings.hpp"
#include "mpi/error.hpp"
#include "mpi/intake.hpp"
#include "mpi/later_plan.hpp"
#include "mpi/merged_list.hpp"
#include "mpi/mergers.hpp"
#include "mpi/orders.hpp"
#include "mpi/outbox.hpp"
#include "mpi/poll.hpp"
#include "mpi/protocol.hpp"
#include "mpi/roster.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

// One that computes, one whose inputs are on their way, one whose partials are.
constexpr int ahead = 3;

// How long workers have, in seconds, to say that they have ended, once nothing is left to be saved:
// launchers that end a job give it 30.
constexpr double patience = 5;

// Of the processor, so that ranks which share cores do not count each other's work.
double thread_seconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

/// The communication thread's work, by one plan.
class Master {
 public:
  /// `failures` of workers that take no part; `ask` where others can be planned, or none.
  Master(const Plan& plan, const MergeShares& shares, Assembler& assembler, MergedList& merged,
         const Abort& abort, const CheckpointOptions& checkpoint, Telemetry& telemetry,
         Communicator& communicator, InputServer* inputs, const Failures& failures,
         const AskForPlan& ask, double begin)
      : plan_(plan),
        assembler_(assembler),
        merged_(merged),
        abort_(abort),
        checkpoint_(checkpoint),
        telemetry_(telemetry),
        communicator_(communicator),
        mergers_(plan, shares, communicator),
        roster_(1 + mergers_.count(), failures),
        intake_(plan, assembler, communicator, telemetry,
                [this](const Source& source) { received(source); }),
        inputs_(inputs),
        outbox_(communicator),
        held_(plan, assembler, ask, failures.size(),
              mergers_.count() > 0 || !checkpoint.directory.empty(), begin) {
    if (checkpoint.same_run && checkpoint.stop) checkpoints_told_ = checkpoint.stop->checkpoints;
    result().subproblems.resize(failures.size());
    listen();
  }

  /// Until everything is merged, and written by the mergers, or something has failed: then nothing
  /// more can be done. Where it was to stop meanwhile, mergers make their checkpoints.
  void work() {
    while (!(all_merged() && mergers_.have_written()) && !abort_.failed() && !mergers_.failed()) {
      if (!dispatcher_ && mergers_.are_ready()) begin();
      if (dispatcher_ && !all_merged() && dispatcher_->workers_left() == 0)
        throw Error(roster_.nobody_left());
      step([this] {
        const bool told = tell_mergers();
        return assign() || told;
      });
    }
  }
  /// Stops the other ranks and waits until they have ended.
  void end() {
    intake_.drop_all();
    Message stop;
    stop.said = Said::stop;
    stop.ending = mergers_.failed() ? Ending::abandon : ending_of(abort_, all_merged());
    if (stop.ending != Ending::complete) pass_.again.reset();
    stop.goes_on = pass_.again.has_value();
    for (int rank = 1; rank < communicator_.size(); ++rank) {
      if (rank <= mergers_.count() || !roster_.has_ended(roster_.worker_of(rank))) send(rank, stop);
    }
    if (inputs_) inputs_->refuse_all();
    double since = now_seconds();
    while (!all_ended() || under_way()) {
      step([] { return false; });
      // Mergers may take long to make their checkpoints.
      if (stop.ending == Ending::complete || !mergers_.have_ended()) since = now_seconds();
      if (now_seconds() - since > patience) throw Error(roster_.silent());
    }
    // Where the last one to end was lost, one more message is waited for.
    incoming_request_.cancel();
    while (!incoming_request_.settled()) {
    }
    result().stalled_seconds = intake_.stalled_seconds();
    if (dispatcher_) {
      result().repeated = dispatcher_->repeated() * subproblems_of_order(plan_);
      result().withdrawn = dispatcher_->withdrawn() * subproblems_of_order(plan_);
    }
    if (inputs_) result().served = inputs_->served();
  }
  const Mergers& mergers() const { return mergers_; }
  Pass& pass() { return pass_; }
  const Roster& roster() const { return roster_; }

 private:
  MasterResult& result() { return pass_.result; }
  bool all_merged() const { return dispatcher_ && dispatcher_->all_merged(); }
  bool all_ended() const { return mergers_.have_ended() && roster_.have_all_ended(); }
  bool under_way() const {
    return !outbox_.empty() || intake_.under_way() || mergers_.under_way() ||
           (inputs_ && !inputs_->idle());
  }

  template <typename Assign>
  void step(const Assign& assign) {
    const double begin = thread_seconds();
    bool did_something = false;
    for (const auto& [id, pieces] : merged_.take()) {
      merged(id, pieces);
      did_something = true;
    }
    if (did_something) intake_.merged();
    did_something |= mergers_.poll();
    for (; !all_ended() && receive(); did_something = true) {
    }
    did_something |= intake_.poll();
    did_something |= inputs_ && inputs_->poll();
    did_something |= assign();
    outbox_.poll();
    if (did_something) {
      const double asking = std::exchange(asking_seconds_, 0);  // is planning, not bookkeeping
      result().dispatch_seconds += thread_seconds() - begin - asking;
    }
    pause_.after(did_something, under_way());
  }

  void listen() {
    incoming_request_ = communicator_.receive(MPI_ANY_SOURCE, to_master_tag, incoming_.bytes());
  }

  // All ranks that merge have said what they have.
  void begin() {
    if (!checkpoint_.same_run) {
      const Resumed resumed = mergers_.resumed(assembler_.resumed());
      telemetry_.add_restored_scores(resumed.scores - assembler_.resumed().scores);
      tell_resumed(checkpoint_, resumed);
    }
    make_dispatcher();
    for (int worker = 0; worker < roster_.count(); ++worker) {
      if (roster_.has_failed(worker)) dispatcher_->lost(worker, false);
    }
  }

  void make_dispatcher() {
    Dispatcher::Options options;
    options.now = now_seconds;
    options.held_from = held_.first_id();
    if (computes_by_groups(plan_)) {
      // One that computes, and one to go on with: no more, for the last ones are to be shared out.
      options.ahead = 2;
      options.window = group_total(plan_);
      dispatcher_.emplace(
          group_total(plan_), roster_.count(), options,
          [done = plan_.groups_done, pieces = pieces_of_group(plan_)](std::int64_t group) {
            Dispatcher::Work work;
            work.pieces = group < done ? 0 : pieces;
            return work;
          });
      return;
    }
    options.ahead = ahead;
    options.window = mergers_.window(intake_.window());
    options.chunks_kept = plan_.device.kv_slots;
    dispatcher_.emplace(
        plan_, roster_.count(), options, [this](const SubproblemKey& key, std::int64_t chunk) {
          return plan_.merged_chunks.contains(chunk) ? assembler_.lacking_pieces(key, chunk)
                                                     : mergers_.lacking_pieces(key, chunk);
        });
  }

  // All that is not held has been handed out: asks whether another plan takes the rest.
  void pass_held() {
    while (!pass_.again && dispatcher_->has_come_to_held()) {
      const double begin = thread_seconds();
      if (checkpoint_.stop && checkpoint_.stop->stop_now()) {
        held_.let_go();
      } else {
        pass_.again = held_.ask(roster_.failures());
      }
      asking_seconds_ += thread_seconds() - begin;
      if (pass_.again) return leave();
      dispatcher_->hold_from(held_.first_id());
    }
  }
  // To the next plan, on all ranks.
  void leave() {
    dispatcher_->leave_held();
    assembler_.leave_from(held_.first());
    Message message;
    message.said = Said::leave;
    message.subproblem = held_.first();
    for (int merger = 1; merger <= mergers_.count(); ++merger) send(merger, message);
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
    if (rank <= mergers_.count())
      throw LostRank(fmt::format("rank {}, which merges, was lost", rank));
    const int worker = roster_.worker_of(rank);
    roster_.lose(worker);
    fmt::print(stderr, "stream-cqsa: rank {} was lost{}\n", rank,
               all_merged() ? "" : "; its work goes to the others");
    if (dispatcher_) dispatcher_->lost(worker, true);
    intake_.forget(rank);
    if (inputs_) inputs_->forget(rank);
    orders_.forget(rank);
  }

  void hear(int rank, const Message& message) {
    if (communicator_.is_lost(rank)) return;
    if (rank <= mergers_.count()) return hear_merger(rank, message);
    const int worker = roster_.worker_of(rank);
    switch (message.said) {
      case Said::ready:
        return has_prepared();
      case Said::offer:
        return intake_.offer(rank, message);
      case Said::computed:
        count_computed(worker);
        held_.has_computed(worker, message.so_far);
        dispatcher_->computed(worker, message.subproblem);
        orders_.computed({message.subproblem, rank, message.order}, 1 + message.mergers);
        return intake_.computed(rank, message);
      case Said::left_out:
        orders_.left_out(rank, message.subproblem);
        return dispatcher_->left_out(worker, message.subproblem);
      case Said::failed:
        roster_.fail(worker, message.text.data());
        fmt::print(stderr, "stream-cqsa: rank {} gave up: {}; its work goes to the others\n", rank,
                   message.text.data());
        if (dispatcher_) dispatcher_->lost(worker, false);
        return;
      case Said::read:
        if (inputs_) return inputs_->request(rank, message);
        break;
      case Said::ended:
        return roster_.end(worker);
      default:
        break;
    }
    throw Error(fmt::format("rank {} sent a message that is not for this rank", rank));
  }

  // A worker.
  void has_prepared() {
    const double now = now_seconds();
    held_.has_prepared(now);
    if (pass_.began == 0) pass_.began = now;
  }

  void count_computed(int worker) {
    const std::int64_t computed = subproblems_of_order(plan_);
    result().subproblems[static_cast<std::size_t>(worker)] += computed;
    for (std::int64_t i = 0; i < computed; ++i) telemetry_.add_subproblem();
  }

  void hear_merger(int rank, const Message& message) {
    switch (message.said) {
      case Said::merged:
        telemetry_.add_scores(static_cast<std::uint64_t>(message.scores));
        return merged(message.subproblem, message.count);
      case Said::received:
        return received({message.subproblem, message.rank, message.order});
      case Said::ready:
        held_.has_prepared(now_seconds());
        return mergers_.hear(rank, message);
      default:
        return mergers_.hear(rank, message);
    }
  }

  void merged(std::int64_t id, std::int64_t pieces) {
    for (std::int64_t piece = 0; piece < pieces; ++piece) dispatcher_->merged_piece(id);
  }

  // By this rank, or a merger.
  void received(const Source& source) {
    if (communicator_.is_lost(source.rank)) return;
    if (orders_.received(source))
      dispatcher_->received(roster_.worker_of(source.rank), source.subproblem);
  }

  // Takes from workers what others have computed.
  void withdraw() {
    for (const auto& [worker, id] : dispatcher_->withdrawals()) {
      const auto order = orders_.number(roster_.rank_of(worker), id);
      if (!order) continue;
      Message message;
      message.said = Said::withdraw;
      message.subproblem = id;
      message.order = *order;
      send(roster_.rank_of(worker), message);
    }
  }

  // Gives each worker what it may have.
  bool assign() {
    bool did_something = false;
    if (!dispatcher_) return false;
    withdraw();
    for (int worker = 0; worker < roster_.count(); ++worker) {
      while (const auto order = next_order(worker)) {
        for (const std::int64_t id : order->abandon) drop(roster_.rank_of(worker), id);
        Message message;
        message.said = Said::assign;
        message.subproblem = order->assignment.id;
        message.order = orders_.give(roster_.rank_of(worker), message.subproblem);
        message.set_wanted(order->assignment.wanted);
        send(roster_.rank_of(worker), message);
        did_something = true;
      }
    }
    return did_something;
  }

  std::optional<Dispatcher::Order> next_order(int worker) {
    pass_held();
    return dispatcher_->next(worker);
  }

  // The partials of the order that a worker has given up come to every rank that merges.
  void drop(int rank, std::int64_t id) {
    Message message;
    message.said = Said::drop;
    message.rank = rank;
    message.subproblem = id;
    message.order = orders_.number(rank, id).value();
    intake_.drop({id, rank, message.order});
    for (int merger = 1; merger <= mergers_.count(); ++merger) send(merger, message);
  }

  // Only this rank hears signals. A stop is told when this rank has made its own checkpoint.
  bool tell_mergers() {
    const std::int64_t asked = checkpoint_.stop ? checkpoint_.stop->checkpoints.load() : 0;
    if (asked == std::exchange(checkpoints_told_, asked)) return false;
    Message message;
    message.said = Said::checkpoint;
    for (int merger = 1; merger <= mergers_.count(); ++merger) send(merger, message);
    return true;
  }

  void send(int rank, const Message& message) {
    outbox_.send(rank, rank <= mergers_.count() ? to_master_tag : to_worker_tag, message);
  }

  const Plan& plan_;
  Assembler& assembler_;
  MergedList& merged_;
  const Abort& abort_;
  const CheckpointOptions& checkpoint_;
  std::int64_t checkpoints_told_ = 0;
  Telemetry& telemetry_;
  Communicator& communicator_;
  Mergers mergers_;
  Roster roster_;
  std::optional<Dispatcher> dispatcher_;  ///< once all ranks that merge are ready
  Intake intake_;
  InputServer* inputs_;
  Orders orders_;
  Outbox outbox_;
  Message incoming_;
  Request incoming_request_;
  int source_ = 0;
  Pause pause_;
  HeldGroups held_;
  double asking_seconds_ = 0;
  Pass pass_;
};

// Where the run had ended already, by that, else by `error`.
LastWords last_words(const Abort& abort, const Plan& plan, const Mergers& mergers,
                     const RunOptions& options, const std::exception& error) {
  std::exception_ptr reason = std::make_exception_ptr(Error(error.what()));
  try {
    mergers.rethrow_if_failed();
    rethrow_if_failed(abort, plan, mergers.durable_scores());
  } catch (const std::exception&) {
    reason = std::current_exception();
  }
  if (options.last_words) return options.last_words(reason);
  return {fmt::format("rank 0: {}", error.what()), 1};
}

}  // namespace

Pass run_pass(const Plan& plan, const MergeShares& shares, const MasterRun& run,
              const CheckpointOptions& checkpoint, const Failures& failures, const AskForPlan& ask,
              const std::function<void()>& ready, OthersWaiting& others) {
  const double begin = now_seconds();
  Telemetry& telemetry = run.telemetry;
  Communicator& communicator = run.communicator;
  RunOptions options = run.options;
  options.checkpoint = checkpoint;
  const HostBuffer memory(plan.host.bytes());
  Abort abort;
  MergedList merged;
  Assembler assembler(plan, run.outputs, memory.data(), options, telemetry, abort);
  assembler.on_merged([&](std::int64_t subproblem) { merged.add(subproblem); });
  std::optional<InputServer> inputs;
  if (run.served) {
    inputs.emplace(plan, *run.served, memory.data() + plan.host.cache_offset(),
                   options.read_threads, communicator);
  }
  ready();
  Master master(plan, shares, assembler, merged, abort, options.checkpoint, telemetry, communicator,
                inputs ? &*inputs : nullptr, failures, ask, begin);
  {
    Crew crew(abort);
    try {
      try {
        assembler.start(crew);
        master.work();
      } catch (const LostRank&) {
        throw;
      } catch (...) {
        abort.fail();
      }
      assembler.end_of_partials();
      master.end();
    } catch (const std::exception& error) {
      // Others can no longer be told, and MPI may still write into what this would free.
      const LastWords last = last_words(abort, plan, master.mergers(), options, error);
      communicator.abort(last.line, last.status);
    }
    crew.join();
  }
  if (master.pass().again) others.begin(master.roster().absent());
  master.mergers().rethrow_if_failed();
  rethrow_if_failed(abort, plan, master.mergers().durable_scores());

  Pass pass = std::move(master.pass());
  pass.result.failures = master.roster().failures();
  pass.result.run = result_of(assembler, memory.bytes());
  if (checkpoint.same_run) pass.result.run.checkpoint.resumed = {};  // this run has left it
  return pass;
}

}  // namespace stream_cqsa
