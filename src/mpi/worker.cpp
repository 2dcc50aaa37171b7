#include "mpi/worker.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>

#include "engine/buffer.hpp"
#include "engine/monitor.hpp"
#include "engine/pipeline.hpp"
#include "engine/prepare.hpp"
#include "mpi/begun_orders.hpp"
#include "mpi/error.hpp"
#include "mpi/later_plan.hpp"
#include "mpi/outbox.hpp"
#include "mpi/partial_sender.hpp"
#include "mpi/poll.hpp"
#include "mpi/protocol.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

// The thread that takes orders must never wait to pass one on.
constexpr std::size_t most_assignments = std::size_t{1} << 30;

/// The computing half: what one failure ends.
class Computing {
 public:
  Computing(const Plan& plan, const Inputs& inputs, Backend& backend, const RunOptions& options,
            Telemetry& telemetry, Communicator& communicator, std::byte* memory,
            RemoteInputs* remote)
      : by_groups_(computes_by_groups(plan)),
        subproblems_of_group_(plan.division.quorum_count()),
        backend_(backend),
        telemetry_(telemetry),
        read_threads_(std::max(options.read_threads, 1)),
        in_parts_(computes_in_parts(plan)),
        before_(counted()),
        sender_(plan, options.mergers, memory + plan.host.state_offset(), communicator, abort_,
                [this] { return counted().since(before_); }),
        assignments_(abort_, most_assignments),
        pipeline_(plan, inputs, memory + plan.host.cache_offset(), backend, sender_, telemetry,
                  abort_),
        crew_(abort_) {
    pipeline_.on_begin([this](std::int64_t order) { return begun_.begin(order); });
    abort_.on_failure([this] { backend_.cancel(); });
    if (remote) abort_.on_failure([remote] { remote->cancel(); });
    pipeline_.start(
        crew_, [this] { return next(); }, options.read_threads, [this] { finished_ = true; });
  }
  ~Computing() {
    end();
    backend_.quiesce();
  }

  PartialSender& sender() { return sender_; }
  void assign(const Message& message) {
    sender_.ordered(message.subproblem, message.order);
    try {
      if (!by_groups_) {
        assignments_.push({message.subproblem, message.wanted_positions(), message.order});
        return;
      }
      const std::int64_t first = message.subproblem * subproblems_of_group_;
      for (std::int64_t i = 0; i < subproblems_of_group_; ++i)
        assignments_.push({first + i, {}, message.order});
    } catch (const Aborted&) {
      // The failure is told next, and the master gives the subproblem to another.
    }
  }
  /// Leaves an order out. False where it has begun.
  bool withdraw(const Message& message) {
    if (!begun_.withdraw(message.order)) return false;
    sender_.left_out(message.subproblem);
    return true;
  }
  bool failed() const { return abort_.failed(); }
  void rethrow_if_failed() const { abort_.rethrow_if_failed(); }

  /// No more assignments; those under way are given up.
  void end() {
    assignments_.close();
    if (!finished_) abort_.stop();
    crew_.join();
  }

 private:
  std::optional<Assignment> next() {
    auto assignment = assignments_.pop();
    while (assignment && begun_.is_withdrawn(assignment->order)) assignment = assignments_.pop();
    return assignment;
  }
  // By all plans.
  RunSoFar counted() const {
    RunSoFar run;
    run.totals = telemetry_.totals();
    run.scores = telemetry_.scores_done();
    run.subproblems = telemetry_.subproblems_done();
    run.read_threads = read_threads_;
    run.in_parts = in_parts_;
    return run;
  }

  const bool by_groups_;
  const std::int64_t subproblems_of_group_;
  Abort abort_;
  Backend& backend_;
  Telemetry& telemetry_;
  const int read_threads_;
  const bool in_parts_;
  const RunSoFar before_;
  PartialSender sender_;
  BoundedQueue<Assignment> assignments_;
  BegunOrders begun_;
  Pipeline pipeline_;
  std::atomic<bool> finished_{false};
  Crew crew_;
};

/// The communication thread's work, by one plan.
class Worker {
 public:
  Worker(Backend& backend, int mergers, Communicator& communicator, RemoteInputs* remote)
      : backend_(backend),
        mergers_(mergers),
        communicator_(communicator),
        remote_(remote),
        outbox_(communicator) {
    if (remote_) remote_->reopen();
    listen();
  }

  /// Begins to compute; a failure is told to the master.
  void start(const Plan& plan, const WorkerBudgets& budgets, const Inputs& inputs,
             const RunOptions& options, Telemetry& telemetry) {
    try {
      check_inputs(plan, inputs);
      const DeviceTraits device = backend_.traits(plan.problem());
      const auto within = [&](std::int64_t device_budget) {
        return worker_plan(plan, device, device_budget, budgets.host);
      };
      plan_ = within(budgets.device);
      prepare(backend_, *plan_, within, options.warn, telemetry);
      memory_ = std::make_unique<HostBuffer>(plan_->host.bytes());
      pinned_ = backend_.pin({memory_->data(), static_cast<std::size_t>(memory_->bytes())});
      computing_ = std::make_unique<Computing>(*plan_, inputs, backend_, options, telemetry,
                                               communicator_, memory_->data(), remote_);
      say(Said::ready, "");
    } catch (const std::exception& error) {
      give_up(error.what());
    }
  }

  /// Until the master says stop.
  void work() {
    while (!stopped_) {
      bool did_something = hear();
      if (computing_ && failure_.empty() && computing_->failed()) {
        computing_->end();
        try {
          computing_->rethrow_if_failed();
        } catch (const std::exception& error) {
          give_up(error.what());
        }
      }
      did_something |= send();
      pause_.after(did_something, !all_sent());
    }
    if (computing_) computing_->end();
    for (int rank = mergers_; rank >= 0 && !master_lost_; --rank) say(Said::ended, "", rank);
    // Until then MPI may read what this would free, of a lost master too.
    for (; !all_sent(); pause_.after(send(), true)) {
    }
    if (master_lost_) throw LostRank("rank 0, the master, was lost");
  }

  WorkerResult result() {
    return {failure_, backend_.scores_computed(), backend_.allocated_bytes(),
            backend_.memory_in_use(), memory_ ? memory_->bytes() : 0};
  }
  /// Whether the master may have another plan.
  bool goes_on() const { return incoming_.goes_on && failure_.empty(); }

 private:
  void listen() { request_ = communicator_.receive(0, to_worker_tag, incoming_.bytes()); }

  bool hear() {
    bool did_something = false;
    for (; !stopped_ && request_.settled(); did_something = true) {
      master_lost_ = request_.test() == Request::State::lost;
      stopped_ = master_lost_ || incoming_.said == Said::stop;
      if (stopped_) continue;
      if (incoming_.said == Said::assign && failure_.empty()) computing_->assign(incoming_);
      if (incoming_.said == Said::withdraw && failure_.empty() && computing_->withdraw(incoming_))
        say_left_out(incoming_);
      listen();
    }
    return did_something;
  }

  bool send() {
    outbox_.poll();
    const bool asked = remote_ && remote_->poll();
    return (computing_ && computing_->sender().send()) || asked;
  }
  /// Nor is anything still to come that was asked for.
  bool all_sent() const {
    return outbox_.empty() && (!computing_ || computing_->sender().empty()) &&
           (!remote_ || remote_->idle());
  }

  void give_up(const std::string& failure) {
    failure_ = failure;
    say(Said::failed, failure);
  }

  void say(Said said, const std::string& text, int to = 0) {
    Message message;
    message.said = said;
    message.set_text(text);
    say(message, to);
  }
  void say_left_out(const Message& withdrawn) {
    Message message;
    message.said = Said::left_out;
    message.subproblem = withdrawn.subproblem;
    message.order = withdrawn.order;
    say(message, 0);
  }
  void say(const Message& message, int to) {
    send();  // behind every offer
    outbox_.send(to, to_master_tag, message);
  }

  Backend& backend_;
  int mergers_;
  Communicator& communicator_;
  RemoteInputs* remote_;
  std::string failure_;
  std::optional<Plan> plan_;  ///< with this rank's arenas
  std::unique_ptr<HostBuffer> memory_;
  std::shared_ptr<void> pinned_;
  std::unique_ptr<Computing> computing_;
  Message incoming_;
  Request request_;
  bool stopped_ = false;
  bool master_lost_ = false;
  Outbox outbox_;
  Pause pause_;
};

}  // namespace

WorkerResult run_worker(const Plan& plan, const WorkerBudgets& budgets, const Inputs& inputs,
                        Backend& backend, const RunOptions& options, Telemetry& telemetry,
                        Communicator& communicator, RemoteInputs* remote) {
  WorkerResult all;
  std::optional<LaterPlan> later;
  for (bool goes_on = true; goes_on;) {
    Worker worker(backend, options.mergers, communicator, remote);
    worker.start(later ? later->plan : plan, budgets, inputs, options, telemetry);
    worker.work();
    const WorkerResult by_this = worker.result();
    all = {by_this.failure, by_this.scores_computed,
           std::max(all.device_bytes, by_this.device_bytes),
           std::max(all.device_in_use, by_this.device_in_use),
           std::max(all.host_bytes, by_this.host_bytes)};
    goes_on = worker.goes_on() && (later = receive_later_plan(communicator));
  }
  return all;
}

}  // namespace stream_cqsa
