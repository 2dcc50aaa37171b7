// What a plan's JSON consists of, for those that write and read it.
#pragma once

#include <array>
#include <iosfwd>
#include <nlohmann/json.hpp>
#include <string_view>

#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// What may stand beside a plan and is skipped when it is read: it follows from the rest, and from
/// the costs of the machine that made it.
inline constexpr std::string_view subproblems_key = "subproblems";
inline constexpr std::string_view predicted_key = "predicted";
inline constexpr std::string_view for_workers_key = "predicted_for_workers";
inline constexpr std::string_view alternatives_key = "alternatives";
inline constexpr std::string_view smallest_budget_key = "smallest_budget";
inline constexpr std::array skipped_keys = {subproblems_key, predicted_key, for_workers_key,
                                            alternatives_key, smallest_budget_key};

/// "groups_outer" or "groups_inner".
std::string_view name_of(ScheduleOrder order);

/// "memory", "file" or "device".
std::string_view name_of(AccumulatorPlacement placement);

/// As write_json() of a plan, with what is in the object `beside` before the subproblems.
void write_json(const Plan& plan, const nlohmann::ordered_json& beside, bool subproblems,
                std::ostream& out);

}  // namespace stream_cqsa
