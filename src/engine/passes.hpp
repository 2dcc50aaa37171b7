// A run by one plan after another, of which each begins where the one before ends.
#pragma once

#include <cstdint>

#include "engine/assembler.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/tuning.hpp"

namespace stream_cqsa {

/// Whether a run of `plan`, with a checkpoint if it is `durable`, can go on by `next`, which has
/// the same division. `has_room` is asked where `next` keeps more in files; none: there is none.
bool can_go_on_by(const Plan& plan, const Plan& next, bool durable, const PlanFilter& has_room);

/// What a rank that merges leaves of one plan, but for seconds and its device. The crew has been
/// joined.
RunResult result_of(const Assembler& assembler, std::int64_t host_bytes);

/// Adds what a later plan left, but for seconds and scores_computed.
void add_pass(RunResult& all, const RunResult& pass);

}  // namespace stream_cqsa
