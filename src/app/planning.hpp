// The choice of a plan for a job: of --plan, or by prediction.
#pragma once

#include <string>
#include <vector>

#include "app/calibration.hpp"
#include "app/problem.hpp"
#include "stream_cqsa/plan_choice.hpp"

namespace stream_cqsa {

/// The plan of plan_for() with the others that were predicted, by the costs that are kept for its
/// device. With --plan there are no others. Throws InputError as plan_for().
PlanChoice choose_for(const OpenProblem& open, const ResourceOptions& resources, bool lse,
                      const Capacity& capacity);

/// What 1, 2, 4, ... and all workers of `capacity`, which are alike, are predicted to take, the
/// last of which is known. Of numbers for which nothing fits there is none.
std::vector<ForWorkers> choose_for_workers(const OpenProblem& open,
                                           const ResourceOptions& resources, bool lse,
                                           const Capacity& capacity, const Prediction& of_all);

/// The smallest budgets for the same problem, of any plan that the options leave open.
SmallestBudgets smallest_for(const OpenProblem& open, const ResourceOptions& resources, bool lse,
                             const Capacity& capacity, const Plan& plan);

/// What `plan` prints of the choice below the plan and its prediction.
std::string describe(const PlanChoice& choice, const SmallestBudgets& smallest);

}  // namespace stream_cqsa
