#include "app/rehearsal_findings.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <sstream>

#include "app/report.hpp"
#include "app/text.hpp"
#include "core/counted.hpp"
#include "stream_cqsa/bytes.hpp"

namespace stream_cqsa {
namespace {

using nlohmann::json;

double flop_of(const Plan& plan, std::uint64_t scores) {
  return 4.0 * static_cast<double>(plan.problem().head_dim) * static_cast<double>(scores);
}

// Floating-point operations per second of all that was tried; 0 where no time was measured.
double rate_of(const Plan& plan, const std::vector<TriedSubproblem>& tried) {
  double flop = 0, seconds = 0;
  for (const TriedSubproblem& each : tried) {
    flop += flop_of(plan, each.scores);
    seconds += each.kernel_seconds;
  }
  return seconds > 0 ? flop / seconds : 0;
}

Needs needs_of(const Plan& plan, const OpenProblem& open) {
  Needs needs;
  needs.traffic = estimate_traffic(plan);
  if (plan.placement == AccumulatorPlacement::device)
    needs.accumulators_on_device = plan.device.state_slots * plan.device.state_slot_bytes;
  needs.accumulators_in_memory = plan.host.accumulators * plan.host.accumulator_bytes;
  needs.accumulators_in_file = plan.scratch_bytes;
  needs.output = output_desc(open).bytes();
  const Problem& p = plan.problem();
  if (plan.request.lse) needs.lse = lse_desc(p.batch, p.query_heads, p.query_length).bytes();
  return needs;
}

std::string accumulators_text(const Needs& needs, bool lacks_scratch) {
  if (needs.accumulators_on_device > 0)
    return fmt::format("{} on the device", format_bytes(needs.accumulators_on_device));
  std::string text = fmt::format("{} in memory", format_bytes(needs.accumulators_in_memory));
  if (needs.accumulators_in_file == 0) return text;
  text += fmt::format(", and a file of up to {}", format_bytes(needs.accumulators_in_file));
  return text + (lacks_scratch ? ": the run needs --scratch DIR, or more --host-memory" : "");
}

std::string needs_text(const Needs& needs, bool synthetic, bool lacks_scratch) {
  const auto bytes = [](double count) {
    return format_bytes(static_cast<std::int64_t>(std::min(count, 0x1p62)));
  };
  return fmt::format("{:<18}{} {}, accumulators: {}\n{:<18}{} of output{}\n", "the whole run",
                     bytes(needs.traffic.read), synthetic ? "generated" : "read",
                     accumulators_text(needs, lacks_scratch), "", format_bytes(needs.output),
                     needs.lse > 0 ? ", " + format_bytes(needs.lse) + " of lse" : "");
}

json needs_json(const Needs& needs, bool lacks_scratch) {
  return {{"read_bytes", needs.traffic.read},
          {"accumulator_bytes",
           {{"device", needs.accumulators_on_device},
            {"memory", needs.accumulators_in_memory},
            {"file", needs.accumulators_in_file}}},
          {"lacks_scratch", lacks_scratch},
          {"output_bytes", needs.output},
          {"lse_bytes", needs.lse}};
}

Verification all_rows(const std::vector<TriedSubproblem>& tried) {
  Verification all;
  for (const TriedSubproblem& each : tried) {
    all.rows.insert(all.rows.end(), each.verification.rows.begin(), each.verification.rows.end());
  }
  return all;
}

std::string verdict(const Findings& found) {
  if (!found.good()) return describe(found.rows) + "\n";
  return fmt::format("verified: {} of {}\n", counted(found.rows.compared(), "row"),
                     counted(std::ssize(found.tried), "subproblem"));
}

}  // namespace

std::string describe(const Plan& plan, const TriedSubproblem& tried) {
  const double flop = flop_of(plan, tried.scores);
  return fmt::format(
      "{:<18}{}, {}, {:.4g} TFLOP in {}: {}; {}\n", fmt::format("subproblem {}", tried.id),
      counted(tried.chunks, "chunk"), counted(tried.pairs, "pair"), flop * 1e-12,
      format_duration(tried.kernel_seconds),
      format_flops(flop / std::max(tried.kernel_seconds, 1e-9)), describe(tried.verification));
}

json to_json(const Plan& plan, const TriedSubproblem& tried) {
  const SubproblemKey key = plan.key(tried.id);
  const double flop = flop_of(plan, tried.scores);
  const double seconds = tried.kernel_seconds;
  return {{"id", tried.id},
          {"batch", key.batch},
          {"group", key.group},
          {"quorum", key.quorum},
          {"chunks", tried.chunks},
          {"pairs", tried.pairs},
          {"scores", tried.scores},
          {"flop", flop},
          {"kernel_seconds", seconds},
          {"seconds", tried.seconds},
          {"flop_per_second", seconds > 0 ? json(flop / seconds) : json()},
          {"rows", to_json(tried.verification)}};
}

TriedSubproblem read_tried(const json& json) {
  return {json.at("id").get<std::int64_t>(),       json.at("chunks").get<std::int64_t>(),
          json.at("pairs").get<std::int64_t>(),    json.at("scores").get<std::uint64_t>(),
          json.at("kernel_seconds").get<double>(), json.at("seconds").get<double>(),
          read_verification(json.at("rows"))};
}

Findings findings_of(const RehearsedPlan& planned, std::vector<TriedSubproblem> tried,
                     const OpenProblem& open) {
  const double rate = rate_of(planned.plan, tried);
  Findings found{planned, std::move(tried),
                 rate,    expect(planned.plan, {}, open.inputs),
                 {},      needs_of(planned.plan, open),
                 {}};
  if (rate > 0) found.at_rate = expect(planned.plan, {}, open.inputs, rate);
  found.rows = all_rows(found.tried);
  return found;
}

std::string describe(const Findings& found, bool synthetic) {
  std::string text =
      fmt::format("{:<18}{} over {} of {}\n", "rate", format_flops(found.rate), found.tried.size(),
                  counted(found.planned.plan.subproblem_count(), "subproblem"));
  text += fmt::format("{:<18}{}\n", "predicted", describe(found.by_costs));
  if (found.at_rate) text += fmt::format("{:<18}{}\n", "at that rate", describe(*found.at_rate));
  return text + needs_text(found.needs, synthetic, found.planned.lacks_scratch) + verdict(found);
}

json to_json(const Findings& found) {
  const Plan& plan = found.planned.plan;
  json subproblems = json::array();
  for (const TriedSubproblem& each : found.tried) subproblems.push_back(to_json(plan, each));
  std::ostringstream plan_text;
  write_json(plan, false, plan_text);
  return {{"ok", found.good()},
          {"subproblems", subproblems},
          {"flop_per_second", found.rate > 0 ? json(found.rate) : json()},
          {"predicted", to_json(found.by_costs)},
          {"predicted_at_that_rate", found.at_rate ? to_json(*found.at_rate) : json()},
          {"whole_run", needs_json(found.needs, found.planned.lacks_scratch)},
          {"plan", json::parse(plan_text.str())}};
}

}  // namespace stream_cqsa
