// Whether disks have room for what a run will write, before it begins.
#pragma once

#include "app/arguments.hpp"
#include "app/checkpoint_directory.hpp"
#include "app/problem.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// Throws InputError when the outputs' directory or --scratch has too little room for the run,
/// saying how much it needs.
void check_room(const Plan& plan, const OpenProblem& open, const JobOptions& options);

/// The same of the directory of a checkpoint, for a run of so many workers beside rank 0, 0: none.
void check_room(const Plan& plan, std::int64_t workers, const CheckpointDirectory& directory);

}  // namespace stream_cqsa
