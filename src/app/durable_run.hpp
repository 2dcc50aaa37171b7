// What --checkpoint adds to a run: before it begins, when it ends early, and when it was killed.
#pragma once

#include <optional>
#include <string>

#include "app/arguments.hpp"
#include "app/checkpoint_directory.hpp"
#include "app/problem.hpp"
#include "stream_cqsa/checkpoint.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// The directory of --checkpoint, or none; with it signals and --max-hours ask for checkpoints.
/// Throws InputError where the options disagree or the directory cannot be used.
std::optional<CheckpointDirectory> open_checkpoint(const JobOptions& options);

/// Whether the run was killed when its outputs were certified: they only lack their names.
bool is_publishing(const CheckpointDirectory& directory, const OutputOptions& options);

/// Gives them these. Returns the exit status. Throws InputError when the directory is another
/// run's.
int end_publishing(CheckpointDirectory& directory, OpenProblem& open, const JobOptions& options,
                   const Capacity& capacity);

/// A plan, and what the engine needs to keep a checkpoint of its run.
struct Durable {
  Plan plan;
  CheckpointOptions options;
};

/// The plan, that of the directory if there is one, and the directory claimed for the run. Throws
/// InputError when the directory is another run's or a disk too small for the run.
Durable prepare_durable(CheckpointDirectory& directory, OpenProblem& open,
                        const JobOptions& options, const Capacity& capacity);

/// Says on standard error what was found in the directory; what is damaged also when `quiet`.
void tell(const Resumed& resumed, const Plan& plan, const std::string& directory, bool quiet);

/// Rethrows the exception that is being handled: as Resumable where the same command continues.
/// `directory` may be none.
[[noreturn]] void rethrow(const CheckpointDirectory* directory);

/// What the program says, and its exit status, where that is not orderly ended.
LastWords last_words(const std::exception_ptr& reason, const CheckpointDirectory* directory);

/// Removes checkpoint and unfinished outputs: a result that is wrong must not be continued.
void discard(CheckpointDirectory& directory, const OutputOptions& options);

}  // namespace stream_cqsa
