// Jobs and costs for tests of the plan that is chosen.
#pragma once

#include <cmath>
#include <optional>

#include "core/plan_requests.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/plan_choice.hpp"

namespace stream_cqsa::testing {

// Rates of a usual machine, each up to 64 times slower.
inline Costs random_costs(Random& random, const DeviceTraits& device) {
  Costs costs = builtin_costs(device);
  for (double* rate :
       {&costs.copy_in, &costs.copy_out, &costs.device_merge, &costs.merge, &costs.read,
        &costs.generate, &costs.write, &costs.rewrite, &costs.receive}) {
    *rate /= std::exp2(random.between(0, 6));
  }
  for (KernelCost& kernel : costs.kernels) kernel.launch_seconds *= random.between(0, 4);
  return costs;
}

inline std::optional<PlanChoice> try_choice(const PlanRequest& request, const Costs& costs,
                                            Divisions divisions = Divisions::requested) {
  try {
    return choose_plan(request, costs, InputKind::files, divisions);
  } catch (const InputError&) {
    return std::nullopt;
  }
}

// Problems of up to a second or so.
inline PlanRequest random_job(Random& random) {
  PlanRequest request = random_shared_request(random);
  request.device.tile = 64;
  request.problem.query_length = random.magnitude(500, 50'000);
  request.problem.key_length = request.problem.query_length * random.between(1, 4);
  request.device_budget = random.magnitude(100 * KiB, GiB);
  request.host_budget = random.magnitude(100 * KiB, GiB);
  request.chunks.reset();
  return request;
}

// A job of which the default leaves everything in one piece.
inline PlanRequest plain_job() {
  PlanRequest request = large_request(16384, 8);
  request.device_budget = request.host_budget = 4 * GiB;
  request.device.merges = true;
  return request;
}

inline Costs even_costs(const DeviceTraits& device) {
  Costs costs = builtin_costs(device);
  for (KernelCost& kernel : costs.kernels) kernel.launch_seconds = 1e-6;
  return costs;
}

}  // namespace stream_cqsa::testing
