#include "app/durable_run.hpp"

#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <numeric>
#include <vector>

#include "app/room.hpp"
#include "app/signals.hpp"
#include "io/partial_file.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {
namespace {

constexpr double default_interval = 60;      // seconds
constexpr double share_of_max_hours = 0.99;  // what is left is for the checkpoint

}  // namespace

std::optional<CheckpointDirectory> open_checkpoint(const JobOptions& options) {
  const auto& [interval, max_hours] = options.checkpoint;
  if (interval && !(*interval > 0)) throw InputError("--checkpoint-interval must be positive");
  if (max_hours && !(*max_hours > 0)) throw InputError("--max-hours must be positive");
  const std::string& path = options.resources.checkpoint;
  if (path.empty()) {
    if (!interval && !max_hours) return std::nullopt;
    throw InputError("--checkpoint-interval and --max-hours need --checkpoint DIR");
  }
  if (max_hours) stop_request().deadline = now_seconds() + share_of_max_hours * 3600 * *max_hours;
  std::optional<CheckpointDirectory> directory(path);
  checkpoint_on_signals();
  return directory;
}

bool is_publishing(const CheckpointDirectory& directory, const OutputOptions& options) {
  const auto there = [](const std::string& output) {
    return output.empty() || PartialFile::can_publish(output);
  };
  return directory.is_publishing() && there(options.output) && there(options.lse);
}

int end_publishing(CheckpointDirectory& directory, OpenProblem& open, const JobOptions& options,
                   const Capacity& capacity) {
  auto identity = identity_of("run", open, options, capacity.numerics);
  directory.require_same(identity);
  add_plan(durable_plan(directory, open, options, capacity), identity);
  directory.require_same(identity);
  for (const std::string& output : {options.output.lse, options.output.output}) {
    if (!output.empty()) PartialFile::publish(output);
  }
  directory.clear();
  fmt::print(stderr, "stream-cqsa: the run had ended; {} is complete, and no report was made\n",
             options.output.output);
  return 0;
}

Durable prepare_durable(CheckpointDirectory& directory, OpenProblem& open,
                        const JobOptions& options, const Capacity& capacity) {
  auto identity = identity_of("run", open, options, capacity.numerics);
  directory.require_same(identity);
  Durable durable{durable_plan(directory, open, options, capacity), {}};
  add_plan(durable.plan, identity);
  check_room(durable.plan, open, options, capacity.workers, &directory);
  durable.options.directory = directory.path();
  durable.options.identity = directory.claim(identity, durable.plan);
  durable.options.interval = options.checkpoint.interval.value_or(default_interval);
  durable.options.stop = &stop_request();
  return durable;
}

void tell(const Resumed& resumed, const Plan& plan, const std::string& directory, bool quiet) {
  if (resumed.is_damaged()) {
    fmt::print(stderr,
               "stream-cqsa: the checkpoint in {} is damaged: {} journal records ({} bytes) "
               "dropped, {} pieces computed again from an older version or from nothing\n",
               directory, resumed.dropped_records, resumed.dropped_bytes, resumed.recomputed);
  }
  if (quiet) return;
  const auto expected = expected_scores(plan);
  const auto all =
      static_cast<double>(std::accumulate(expected.begin(), expected.end(), std::uint64_t{0}));
  fmt::print(stderr, "stream-cqsa: continuing from the checkpoint in {}: {:.1f}% of the scores\n",
             directory, all > 0 ? 100 * static_cast<double>(resumed.scores) / all : 100.0);
}

void rethrow(const CheckpointDirectory* directory) {
  try {
    throw;
  } catch (const InputError&) {
    throw;
  } catch (const Stopped& stopped) {
    throw Resumable(
        fmt::format("stopped after a checkpoint in {}: {:.0f}% of the scores are merged; the same "
                    "command continues",
                    directory->path().string(), std::floor(100 * stopped.merged())));
  } catch (const Error& error) {
    if (!directory || !directory->has_progress()) throw;
    throw Resumable(fmt::format("{}; the same command continues from the checkpoint in {}",
                                error.what(), directory->path().string()));
  }
}

LastWords last_words(const std::exception_ptr& reason, const CheckpointDirectory* directory) {
  try {
    try {
      std::rethrow_exception(reason);
    } catch (const Error&) {
      rethrow(directory);
    }
  } catch (const Resumable& resumable) {
    return {resumable.what(), stopped_status};
  } catch (const InputError& error) {
    return {error.what(), 2};
  } catch (const std::exception& error) {
    return {error.what(), 1};
  }
}

void discard(CheckpointDirectory& directory, const OutputOptions& options) {
  for (const std::string& output : {options.lse, options.output}) {
    if (!output.empty()) std::filesystem::remove(output + ".partial");
  }
  directory.clear();
}

}  // namespace stream_cqsa
