// Plans of small problems, for tests.
#pragma once

#include <cstdint>
#include <optional>

#include "stream_cqsa/plan.hpp"

namespace stream_cqsa::testing {

struct SmallPlan {
  std::int64_t batch = 1;
  std::int64_t ratio = 1;  ///< query heads per key/value head
  std::int64_t kv_heads = 1;
  std::int64_t length = 24;
  std::int64_t key_length = 0;  ///< 0: as `length`
  std::int64_t dim = 4;
  bool causal = false;
  std::int64_t chunks = 7;
  std::int64_t heads_per_group = 1;
  bool lse = true;
  std::int64_t device_budget = std::int64_t{1} << 24;
  std::int64_t host_budget = std::int64_t{1} << 24;
  bool scratch = false;
  DType dtype = DType::f32;
  std::optional<Grid> grid = std::nullopt;  ///< tiles, whatever `chunks` is
};

inline Plan small_plan(const SmallPlan& small) {
  PlanRequest request;
  Problem& problem = request.problem;
  problem.batch = small.batch;
  problem.query_heads = small.kv_heads * small.ratio;
  problem.kv_heads = small.kv_heads;
  problem.query_length = small.length;
  problem.key_length = small.key_length ? small.key_length : small.length;
  problem.head_dim = small.dim;
  problem.dtype = small.dtype;
  problem.mask = small.causal ? Mask::causal : Mask::none;
  problem.scale = default_scale(small.dim);
  request.device.tile = 1;
  request.lse = small.lse;
  request.device_budget = small.device_budget;
  request.host_budget = small.host_budget;
  request.scratch = small.scratch;
  if (small.grid) {
    request.scheme = Scheme::tiles;
    request.grid = small.grid;
  } else {
    request.chunks = small.chunks;
  }
  request.heads_per_group = small.heads_per_group;
  return make_plan(request);
}

}  // namespace stream_cqsa::testing
