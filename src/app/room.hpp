// Whether disks have room for what a run will write, before it begins.
#pragma once

#include "app/arguments.hpp"
#include "app/checkpoint_directory.hpp"
#include "app/problem.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// Throws InputError when a disk has too little room for what a run of so many workers beside rank
/// 0 (0: none) writes to it, in all: outputs, and the accumulators in --scratch or, with one, the
/// states in the directory of a checkpoint. The message says how much it needs.
void check_room(const Plan& plan, const OpenProblem& open, const JobOptions& options,
                std::int64_t workers, const CheckpointDirectory* directory = nullptr);

}  // namespace stream_cqsa
