#include "engine/passes.hpp"

#include <algorithm>
#include <functional>

namespace stream_cqsa {

bool can_go_on_by(const Plan& plan, const Plan& next, bool durable, const PlanFilter& has_room) {
  // The journal is one of the same pieces, and the state file has slots of one size.
  if (durable &&
      (next.placement == AccumulatorPlacement::device || next.piece_tokens != plan.piece_tokens ||
       next.host.accumulator_bytes != plan.host.accumulator_bytes))
    return false;
  if (accumulator_file_bytes(next, durable) <= accumulator_file_bytes(plan, durable)) return true;
  return has_room && has_room(next);
}

RunResult result_of(const Assembler& assembler, std::int64_t host_bytes) {
  RunResult result;
  result.merged_scores = assembler.merged_scores();
  result.output = assembler.non_finite();
  result.host_bytes = host_bytes;
  result.scratch_bytes = assembler.scratch_bytes();
  result.checkpoint = assembler.checkpoint_totals();
  return result;
}

void add_pass(RunResult& all, const RunResult& pass) {
  all.merged_scores.resize(std::max(all.merged_scores.size(), pass.merged_scores.size()), 0);
  std::ranges::transform(pass.merged_scores, all.merged_scores, all.merged_scores.begin(),
                         std::plus<>());
  all.output += pass.output;
  all.device_bytes = std::max(all.device_bytes, pass.device_bytes);
  all.device_in_use = std::max(all.device_in_use, pass.device_in_use);
  all.host_bytes = std::max(all.host_bytes, pass.host_bytes);
  all.scratch_bytes = std::max(all.scratch_bytes, pass.scratch_bytes);
  all.checkpoint += pass.checkpoint;
}

}  // namespace stream_cqsa
