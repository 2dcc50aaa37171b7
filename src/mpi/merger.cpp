#include "mpi/merger.hpp"

#include <fmt/format.h>

#include <cstring>
#include <list>
#include <memory>
#include <optional>
#include <set>

#include "core/merge_shares.hpp"
#include "engine/assembler.hpp"
#include "engine/buffer.hpp"
#include "engine/monitor.hpp"
#include "engine/passes.hpp"
#include "mpi/error.hpp"
#include "mpi/intake.hpp"
#include "mpi/later_plan.hpp"
#include "mpi/merged_list.hpp"
#include "mpi/poll.hpp"
#include "mpi/protocol.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

/// The merging half: what one failure ends.
class Merging {
 public:
  Merging(const Plan& plan, const Outputs& outputs, RunOptions options, Telemetry& telemetry,
          Communicator& communicator, Intake::Received received)
      : outputs_(outputs),
        options_([&] {
          options.checkpoint.stop = &request_;
          return std::move(options);
        }()),
        memory_(plan.host.bytes()),
        assembler_(plan, outputs_, memory_.data(), options_, telemetry, abort_),
        intake_(plan, assembler_, communicator, telemetry, std::move(received)),
        crew_(abort_) {
    assembler_.on_merged([this](std::int64_t subproblem) { merged_.add(subproblem); });
    assembler_.start(crew_);
  }
  ~Merging() { abort_.stop(); }

  Assembler& assembler() { return assembler_; }
  Intake& intake() { return intake_; }
  MergedList& merged() { return merged_; }
  std::int64_t host_bytes() const { return memory_.bytes(); }
  bool failed() const { return abort_.failed(); }
  void rethrow_if_failed() const { abort_.rethrow_if_failed(); }

  void ask_for_checkpoint() { ++request_.checkpoints; }

  /// Begins to end; nothing is merged any more.
  void end(Ending ending) {
    intake_.drop_all();
    if (ending == Ending::complete) {
      assembler_.end_of_partials();
    } else if (ending == Ending::checkpoint && !options_.checkpoint.directory.empty()) {
      request_.stop = true;
    } else {
      abort_.stop();
    }
  }
  /// Waits for the end. Rows that are written are then durable.
  void join() {
    crew_.join();
    if (abort_.failed()) return;
    outputs_.output.sync();
    if (outputs_.lse) outputs_.lse->sync();
  }

 private:
  const Outputs outputs_;
  StopRequest request_;
  const RunOptions options_;
  HostBuffer memory_;
  Abort abort_;
  MergedList merged_;
  Assembler assembler_;
  Intake intake_;
  Crew crew_;
};

/// Gives the outputs, the same ones every time.
using Open = std::function<const Outputs&()>;

/// The communication thread's work, by one plan.
class Merger {
 public:
  /// `absent` ranks compute no more.
  Merger(Telemetry& telemetry, Communicator& communicator, int mergers, const std::set<int>& absent)
      : telemetry_(telemetry),
        communicator_(communicator),
        mergers_(mergers),
        ended_(absent),
        scores_told_(telemetry.scores_done() - telemetry.restored_scores()) {
    for (int rank = mergers + 1; rank < communicator.size(); ++rank) {
      if (communicator.is_lost(rank)) ended_.insert(rank);  // which the master may not know yet
    }
    workers_left_ = communicator.size() - 1 - mergers - static_cast<int>(ended_.size());
    listen();
  }

  /// Begins to merge; a failure is told to the master.
  void start(const Plan& plan, const Range& chunks, std::int64_t host_budget, const Open& open,
             const RunOptions& options) {
    try {
      const int workers = communicator_.size() - 1 - mergers_;
      plan_ = merger_plan(plan, workers, chunks, host_budget);
      const Outputs& outputs = open();
      check_outputs(*plan_, outputs);
      merging_ = std::make_unique<Merging>(*plan_, outputs, options, telemetry_, communicator_,
                                           [this](const Source& source) { say_received(source); });
      say_ready();
    } catch (const std::exception&) {
      give_up();
    }
  }

  /// Until the master says how to end and the workers have ended.
  void work() {
    while (!all_heard() || !sends_.empty() || under_way()) {
      bool did_something = hear();
      did_something |= merge();
      say_written();
      if (!ending_ && failure_.empty() && merging_ && merging_->failed()) end_merging();
      forget_sent();
      pause_.after(did_something, under_way() || !sends_.empty());
    }
    // Where the last one to end was lost, one more message is waited for.
    request_.cancel();
    while (!request_.settled()) {
    }
    end_merging();
    Message& ended = say(Said::ended);
    if (merging_) ended.count = static_cast<std::int64_t>(merging_->assembler().durable_scores());
    send(sends_.back());
    for (; !sends_.empty(); pause_.after(false, true)) forget_sent();
  }

  /// Whether the master may have another plan.
  bool goes_on() const { return goes_on_; }

  MergerResult result() {
    MergerResult result;
    result.failure = failure_;
    if (!merging_) return result;
    result.stalled_seconds = merging_->intake().stalled_seconds();
    result.run = result_of(merging_->assembler(), merging_->host_bytes());
    return result;
  }

 private:
  struct Sending {
    Message message;
    Request request;
  };

  bool under_way() const { return merging_ && merging_->intake().under_way(); }

  void listen() {
    request_ = communicator_.receive(MPI_ANY_SOURCE, to_master_tag, incoming_.bytes());
  }

  // Nothing comes after the master's stop and the last worker's end.
  bool hear() {
    bool did_something = false;
    for (; !all_heard() && receive(); did_something = true) {
    }
    return did_something;
  }
  bool all_heard() const { return ending_ && workers_left_ == 0; }

  // False where no message has come and no rank is lost.
  bool receive() {
    const Request::State state = request_.test(source_);
    if (state == Request::State::pending) return false;
    if (state == Request::State::lost) {
      for (const int rank : communicator_.newly_lost()) lose(rank);
      return true;
    }
    hear(source_, incoming_);
    if (!all_heard()) listen();
    return true;
  }

  void lose(int rank) {
    if (rank <= mergers_) throw LostRank(fmt::format("rank {}, which merges, was lost", rank));
    if (merging_) merging_->intake().forget(rank);
    if (ended_.insert(rank).second) --workers_left_;
  }

  void hear(int rank, const Message& message) {
    if (communicator_.is_lost(rank)) return;
    switch (message.said) {
      case Said::ended:
        if (ended_.insert(rank).second) --workers_left_;
        return;
      case Said::stop:
        ending_ = message.ending;
        goes_on_ = message.goes_on;
        if (merging_ && failure_.empty()) merging_->end(*ending_);
        return;
      case Said::offer:
        return intake().offer(rank, message);
      case Said::computed:
        return intake().computed(rank, message);
      case Said::drop:
        return intake().drop({message.subproblem, message.rank, message.order});
      case Said::leave:
        if (merging_) merging_->assembler().leave_from(message.subproblem);
        return;
      case Said::checkpoint:
        if (merging_) merging_->ask_for_checkpoint();
        return;
      default:
        throw Error(fmt::format("rank {} sent a message that mergers do not get", rank));
    }
  }

  Intake& intake() {
    // Nothing is handed out before all ranks that merge are ready.
    if (!merging_) throw Error("a partial for a merger that is not ready");
    return merging_->intake();
  }

  // Takes partials in, and tells the master what has been merged.
  bool merge() {
    if (!merging_) return false;
    const auto merged = merging_->merged().take();
    for (const auto& [subproblem, pieces] : merged) {
      Message& message = say(Said::merged);
      message.subproblem = subproblem;
      message.count = pieces;
      const std::uint64_t came = telemetry_.scores_done() - telemetry_.restored_scores();
      message.scores = static_cast<std::int64_t>(came - std::exchange(scores_told_, came));
      send(sends_.back());
    }
    if (!merged.empty()) intake().merged();
    try {
      return intake().poll() || !merged.empty();
    } catch (const Aborted&) {
      return true;  // the failure is told next
    }
  }

  // Until the master has heard it from all, a stop still makes checkpoints everywhere.
  void say_written() {
    if (said_written_ || !merging_ || !merging_->assembler().is_complete()) return;
    said_written_ = true;
    say(Said::written);
    send(sends_.back());
  }

  // All that was merged is written, or is in the checkpoint, or something has failed.
  void end_merging() {
    if (!merging_) return;
    merging_->intake().drop_all();
    try {
      if (ending_) merging_->join();
      if (failure_.empty()) merging_->rethrow_if_failed();
    } catch (const Aborted&) {
      // As the master said.
    } catch (const Stopped&) {
      // So too.
    } catch (const std::exception&) {
      give_up();
    }
  }

  // Within a handler.
  void give_up() {
    Message& message = say(Said::failed);
    try {
      throw;
    } catch (const std::exception& error) {
      failure_ = error.what();
      message.bad_input = dynamic_cast<const InputError*>(&error) != nullptr;
    }
    message.set_text(failure_);
    send(sends_.back());
  }

  void say_ready() {
    const Assembler& assembler = merging_->assembler();
    const MergerStart start{merging_->intake().window(), assembler.resumed()};
    std::vector<std::int32_t> merged;
    if (assembler.is_resumed()) merged = assembler.merged_counts();
    start_.resize(sizeof start + merged.size() * sizeof(std::int32_t));
    std::memcpy(start_.data(), &start, sizeof start);
    if (!merged.empty()) {
      std::memcpy(start_.data() + sizeof start, merged.data(), start_.size() - sizeof start);
    }
    say(Said::ready).count = static_cast<std::int64_t>(start_.size());
    send(sends_.back());
    sends_.push_back({{}, communicator_.send(0, start_tag, start_)});
  }

  void say_received(const Source& source) {
    Message& message = say(Said::received);
    message.subproblem = source.subproblem;
    message.rank = source.rank;
    message.order = source.order;
    send(sends_.back());
  }

  void forget_sent() {
    sends_.remove_if([](Sending& sending) { return sending.request.done(); });
  }
  // A message to be filled in and sent.
  Message& say(Said said) {
    Message& message = sends_.emplace_back().message;
    message.said = said;
    return message;
  }
  void send(Sending& sending) {
    sending.request = communicator_.send(0, to_master_tag, sending.message.bytes());
  }

  Telemetry& telemetry_;
  Communicator& communicator_;
  int mergers_;
  int workers_left_ = 0;
  std::set<int> ended_;  ///< workers, well or lost
  std::string failure_;
  std::optional<Plan> plan_;  ///< with this rank's arenas
  std::vector<std::byte> start_;
  std::list<Sending> sends_;
  std::unique_ptr<Merging> merging_;
  std::optional<Ending> ending_;
  bool goes_on_ = false;
  bool said_written_ = false;
  std::uint64_t scores_told_;  ///< of those that have come
  Message incoming_;
  Request request_;
  int source_ = 0;
  Pause pause_;
};

}  // namespace

MergerResult run_merger(const Plan& plan, std::int64_t host_budget,
                        const std::function<Outputs()>& open, const RunOptions& options,
                        Telemetry& telemetry, Communicator& communicator) {
  MergerResult all;
  RunOptions own = options;
  std::optional<Outputs> outputs;
  const Open open_once = [&]() -> const Outputs& {
    if (!outputs) outputs.emplace(open());
    return *outputs;
  };
  try {
    std::optional<LaterPlan> later;
    for (bool goes_on = true; goes_on; own.checkpoint.same_run = true) {
      const Plan& by = later ? later->plan : plan;
      Merger merger(telemetry, communicator, own.mergers, later ? later->absent : std::set<int>());
      merger.start(by, MergeShares(by, own.mergers).chunks(communicator.rank()), host_budget,
                   open_once, own);
      merger.work();
      MergerResult by_this = merger.result();
      if (own.checkpoint.same_run) by_this.run.checkpoint.resumed = {};  // this run has left it
      add_pass(all.run, by_this.run);
      all.failure = by_this.failure;
      all.stalled_seconds += by_this.stalled_seconds;
      goes_on = merger.goes_on() && (later = receive_later_plan(communicator));
    }
  } catch (const LostRank& lost) {
    const bool durable = !own.checkpoint.directory.empty();
    communicator.abort(fmt::format("rank {}: {}{}", communicator.rank(), lost.what(),
                                   durable ? "; the same command continues" : ""),
                       durable ? stopped_status : 1);
  } catch (const std::exception& error) {
    // MPI may still write into what this would free.
    communicator.abort(fmt::format("rank {}: {}", communicator.rank(), error.what()));
  }
  return all;
}

}  // namespace stream_cqsa
