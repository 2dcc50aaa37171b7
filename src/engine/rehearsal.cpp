#include "engine/rehearsal.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "engine/pipeline.hpp"
#include "engine/prepare.hpp"
#include "engine/watch.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

double busy_computing(const Telemetry& telemetry) {
  return telemetry.totals()[static_cast<std::size_t>(Stage::compute)].busy_seconds;
}

void require_complete(const SampledPartials& partials, std::int64_t id, std::uint64_t scores) {
  if (partials.scores() != scores) {
    throw Error(fmt::format("subproblem {}: its partials have {} scores and its pairs {}", id,
                            partials.scores(), scores));
  }
  for (const SampledToken& token : partials.tokens()) {
    if (token.delivered == 1) continue;
    throw Error(fmt::format("subproblem {}: query token {} is in {} partials instead of one", id,
                            token.token, token.delivered));
  }
}

// Ends a group of threads with Stopped where that is asked for before their work has ended.
class Stopper {
 public:
  Stopper(const StopRequest* request, Abort& abort) : request_(request), monitor_(abort) {}

  void watch() {
    auto lock = monitor_.lock();
    while (!monitor_.wait_for(lock, watch_period, [&] { return ended_; })) {
      if (request_ && request_->stop_now()) throw Stopped(0);
    }
  }
  void end() {
    const auto lock = monitor_.lock();
    ended_ = true;
    monitor_.notify();
  }

 private:
  const StopRequest* request_;
  Monitor monitor_;
  bool ended_ = false;
};

}  // namespace

std::uint64_t scores_of(const Plan& plan, std::int64_t id) {
  const QuorumWork work = plan.work(id);
  std::uint64_t scores = 0;
  for (const ChunkPair& pair : work.pairs) {
    scores += static_cast<std::uint64_t>(
        plan.problem().live_scores(work.chunks[static_cast<std::size_t>(pair.query)].queries,
                                   work.chunks[static_cast<std::size_t>(pair.key)].keys));
  }
  const HeadGroup& heads = plan.groups[static_cast<std::size_t>(plan.key(id).group)];
  return scores * static_cast<std::uint64_t>(heads.query_heads(plan.problem()).size());
}

Rehearsal::Rehearsal(const Plan& plan, const Inputs& inputs, Backend& backend,
                     const RunOptions& options, Telemetry& telemetry)
    : plan_(rehearsal_plan(plan)),
      inputs_(inputs),
      backend_(backend),
      read_threads_(options.read_threads),
      stop_(options.checkpoint.stop),
      telemetry_(telemetry) {
  check_inputs(plan_, inputs_);
  prepare(
      backend_, plan_, [whole = plan_](std::int64_t bytes) { return within_device(whole, bytes); },
      options.warn, telemetry_);
  memory_ = HostBuffer(plan_.host.bytes());
  pinned_ = backend_.pin({memory_.data(), static_cast<std::size_t>(memory_.bytes())});
}

RehearsedSubproblem Rehearsal::compute(std::int64_t id, const std::vector<std::int64_t>& tokens) {
  RehearsedSubproblem done{id, scores_of(plan_, id), 0, 0, {}};
  const double begin = now_seconds();
  const double busy_before = busy_computing(telemetry_);
  Abort abort;
  abort.on_failure([this] { backend_.cancel(); });
  SampledPartials partials(plan_, memory_.data() + plan_.host.state_offset(), tokens, abort);
  Pipeline pipeline(plan_, inputs_, memory_.data() + plan_.host.cache_offset(), backend_, partials,
                    telemetry_, abort);
  Stopper stopper(stop_, abort);
  {
    const Quiesce quiesce{backend_};
    Crew crew(abort);
    const auto once = [next = std::optional(Assignment{id, {}})]() mutable {
      return std::exchange(next, std::nullopt);
    };
    crew.start([&] { stopper.watch(); });
    pipeline.start(crew, once, read_threads_, [&] { stopper.end(); });
    crew.join();
  }
  abort.rethrow_if_failed();
  require_complete(partials, id, done.scores);
  done.kernel_seconds = busy_computing(telemetry_) - busy_before;
  done.seconds = now_seconds() - begin;
  done.tokens = partials.tokens();
  return done;
}

}  // namespace stream_cqsa
