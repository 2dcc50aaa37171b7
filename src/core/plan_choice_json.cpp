// A choice among plans as JSON.
#include <fmt/format.h>

#include <algorithm>
#include <ostream>
#include <string>

#include "core/plan_json.hpp"
#include "stream_cqsa/plan_choice.hpp"

namespace stream_cqsa {
namespace {

using OrderedJson = nlohmann::ordered_json;

OrderedJson prediction_json(const Prediction& prediction) {
  return {{"seconds", prediction.seconds}, {"bottleneck", name_of(prediction.bottleneck())}};
}

OrderedJson alternative_json(const Alternative& other) {
  const PlanRequest& request = other.request;
  OrderedJson json = {{"division", name_of(request.scheme)}};
  if (request.grid) {
    json["grid"] = {request.grid->rows, request.grid->columns};
  } else {
    json["c"] = request.chunks.value();
  }
  json["heads_per_group"] = request.heads_per_group.value();
  json["order"] = name_of(other.order);
  json["accumulators"] = name_of(other.placement);
  json["subproblem_count"] = other.subproblems;
  json["default"] = other.is_default;
  json.update(prediction_json(other.prediction));
  return json;
}

}  // namespace

void write_json(const PlanChoice& choice, const SmallestBudgets& smallest, bool subproblems,
                std::ostream& out) {
  OrderedJson others = OrderedJson::array();
  for (const Alternative& other : choice.others) {
    if (others.size() < most_printed) others.push_back(alternative_json(other));
  }
  OrderedJson beside = {{std::string(predicted_key), prediction_json(choice.prediction)}};
  for (const auto& [workers, prediction] : choice.for_workers) {
    OrderedJson json = {{"workers", workers}};
    json.update(prediction_json(prediction));
    beside[std::string(for_workers_key)].push_back(json);
  }
  beside[std::string(alternatives_key)] = others;
  beside[std::string(smallest_budget_key)] = {{"device", smallest.device}, {"host", smallest.host}};
  write_json(choice.plan, beside, subproblems, out);
}

}  // namespace stream_cqsa
