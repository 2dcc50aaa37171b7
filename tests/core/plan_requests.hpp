// Random and large plan requests for the tests of plans.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <random>
#include <sstream>
#include <string>

#include "stream_cqsa/error.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa::testing {

inline constexpr std::uint64_t first_seed = 20260419;
inline constexpr std::int64_t KiB = 1024;
inline constexpr std::int64_t MiB = 1024 * KiB;
inline constexpr std::int64_t GiB = 1024 * MiB;

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  std::int64_t between(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }
  bool chance(int percent) { return between(1, 100) <= percent; }
  // Spread evenly over orders of magnitude.
  std::int64_t magnitude(std::int64_t low, std::int64_t high) {
    const std::int64_t top = between(low, high);
    return std::max(low, top >> between(0, 20));
  }

 private:
  std::mt19937_64 engine_;
};

inline InputTraits random_input(Random& random) {
  return {random.chance(70) ? Layout::bshd : Layout::bhsd, random.chance(20)};
}

inline PlanRequest random_request(Random& random) {
  constexpr DType types[] = {DType::f16, DType::bf16, DType::f32, DType::f64};
  PlanRequest request;
  Problem& problem = request.problem;
  problem.batch = random.between(1, 3);
  problem.kv_heads = random.between(1, 6);
  problem.query_heads = problem.kv_heads * random.between(1, 3);
  problem.query_length = random.magnitude(1, 3000);
  problem.key_length = random.chance(60) ? problem.query_length : random.magnitude(1, 3000);
  problem.head_dim = random.chance(50) ? 8 * random.between(1, 16) : random.between(1, 20);
  problem.dtype = types[random.between(0, 3)];
  problem.output_dtype = types[random.between(0, 3)];
  problem.mask = random.chance(50) ? Mask::causal : Mask::none;
  problem.scale = default_scale(problem.head_dim);
  request.device.tile = random.chance(70) ? std::int64_t{1} << random.between(0, 7) : 96;
  request.device.slot_alignment = std::int64_t{1} << random.between(0, 8);
  request.device.workspace_bytes = random.chance(50) ? 0 : 64 * random.between(1, 100);
  request.query = random_input(random);
  request.key = random_input(random);
  request.value = random_input(random);
  request.output_layout = random.chance(70) ? Layout::bshd : Layout::bhsd;
  request.lse = random.chance(50);
  request.scratch = random.chance(50);
  if (random.chance(30)) request.chunks = random.magnitude(1, 200);
  if (random.chance(30)) request.heads_per_group = random.between(1, problem.kv_heads);
  request.device_budget = random.magnitude(KiB, 16 * MiB);
  request.host_budget = random.magnitude(KiB, 64 * MiB);
  request.device.merges = random.chance(50);
  if (random.chance(25)) {
    problem.queries_before = random.magnitude(0, 3000);
    problem.queries_after = random.magnitude(0, 3000);
  }
  return request;
}

// The same with what only some devices and runs of several ranks ask for.
inline PlanRequest random_shared_request(Random& random) {
  PlanRequest request = random_request(random);
  if (random.chance(60)) {
    request.workers = random.between(1, 9);
    request.mergers = random.chance(30) ? random.between(1, 3) : 0;
    request.device.dispatch_flop = random.magnitude(1, 1 << 24);
    request.device.threads = random.between(1, 64);
  }
  if (random.chance(40)) {
    request.device.overlap_flop = random.magnitude(1, 1 << 24);
    request.device.overlap_worth = random.between(1, 9);
  }
  if (random.chance(30)) {
    request.device.query_item_bytes = 8 * random.between(0, 20);
    request.device.key_item_bytes = 8 * random.between(0, 20);
  }
  request.host_accumulators = random.chance(25);
  return request;
}

/// The same request for tiles, sometimes of a given grid.
inline PlanRequest as_tiles(PlanRequest request, Random& random) {
  request.scheme = Scheme::tiles;
  request.chunks.reset();
  if (random.chance(40)) request.grid = Grid{random.magnitude(1, 60), random.magnitude(1, 60)};
  return request;
}

inline std::optional<Plan> try_plan(const PlanRequest& request) {
  try {
    return make_plan(request);
  } catch (const InputError&) {
    return std::nullopt;
  }
}

inline std::string json_of(const Plan& plan, bool subproblems = false) {
  std::stringstream out;
  write_json(plan, subproblems, out);
  return out.str();
}

inline std::string text_of(const PlanRequest& r) {
  const Problem& p = r.problem;
  return fmt::format(
      "{} B{} Hq{} Hkv{} Nq{}+{}+{} Nk{} D{} tile {} device {} host {} chunks {} grid {}x{} heads "
      "{} workers {} "
      "mergers {}",
      name_of(r.scheme), p.batch, p.query_heads, p.kv_heads, p.queries_before, p.query_length,
      p.queries_after, p.key_length, p.head_dim, r.device.tile, r.device_budget, r.host_budget,
      r.chunks.value_or(0), r.grid.value_or(Grid{0, 0}).rows, r.grid.value_or(Grid{0, 0}).columns,
      r.heads_per_group.value_or(0), r.workers, r.mergers);
}

inline PlanRequest large_request(std::int64_t length, std::int64_t heads) {
  PlanRequest request;
  request.problem = {1,   heads,       heads,       length,       length,
                     128, DType::bf16, DType::bf16, Mask::causal, default_scale(128)};
  request.device_budget = 64 * GiB;
  request.host_budget = std::int64_t{1} << 44;
  return request;
}

}  // namespace stream_cqsa::testing
