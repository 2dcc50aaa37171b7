// A program outside the project that embeds the installed library: plans a small problem and counts
// that the plan covers every score once.
#include <cstdint>
#include <iostream>

#include "stream_cqsa/plan.hpp"

namespace {

stream_cqsa::PlanRequest small_request() {
  stream_cqsa::PlanRequest request;
  request.problem.query_heads = request.problem.kv_heads = 2;
  request.problem.query_length = request.problem.key_length = 2000;
  request.problem.head_dim = 64;
  request.problem.mask = stream_cqsa::Mask::causal;
  request.problem.scale = stream_cqsa::default_scale(64);
  request.device_budget = request.host_budget = std::int64_t{64} << 20;
  request.chunks = 7;
  return request;
}

/// Scores of all heads that the plan's subproblems compute.
std::int64_t planned_scores(const stream_cqsa::Plan& plan) {
  std::int64_t scores = 0;
  for (std::int64_t id = 0; id < plan.subproblem_count(); ++id) {
    const stream_cqsa::HeadGroup& group = plan.groups[plan.key(id).group];
    const std::int64_t heads = group.query_heads(plan.problem()).size();
    const stream_cqsa::QuorumWork work = plan.work(id);
    for (const stream_cqsa::ChunkPair& pair : work.pairs) {
      scores += heads * plan.problem().live_scores(work.chunks[pair.query].queries,
                                                   work.chunks[pair.key].keys);
    }
  }
  return scores;
}

}  // namespace

int main() {
  const stream_cqsa::Plan plan = stream_cqsa::make_plan(small_request());
  std::cout << stream_cqsa::describe(plan);
  const std::int64_t length = plan.problem().query_length;
  const std::int64_t expected = plan.problem().query_heads * (length * (length + 1) / 2);
  const std::int64_t planned = planned_scores(plan);
  if (planned == expected) return 0;
  std::cerr << "the plan computes " << planned << " scores, the mask keeps " << expected << '\n';
  return 1;
}
