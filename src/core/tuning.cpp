#include "stream_cqsa/tuning.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "core/counted.hpp"
#include "core/place_text.hpp"
#include "core/plan_sizes.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/plan_choice.hpp"

namespace stream_cqsa {
namespace {

bool differ(double a, double b) { return std::max(a, b) > (1 + rate_tolerance) * std::min(a, b); }

double ratio(const ChangedRate& rate) {
  return std::max(rate.planned, rate.measured) / std::min(rate.planned, rate.measured);
}

// Whether what was written was whole rows, or what the costs count before these are put together
// from several head groups, and not that as well.
bool has_plain_writes(const Plan& plan, const RunSoFar& run, std::int64_t from) {
  const auto groups = static_cast<std::int64_t>(plan.groups.size());
  if (plan.request.output_layout == Layout::bhsd || groups == 1) return true;
  return !run.in_place && from / groups == plan.groups_done / groups;
}

class Measuring {
 public:
  Measuring(const Plan& plan, const Costs& planned, const RunSoFar& run, double least_seconds)
      : plan_(plan), run_(run), least_seconds_(least_seconds), measured_{planned, {}} {
    const auto read_once = static_cast<double>(of(Stage::checksum).bytes - of(Stage::write).bytes);
    if (read_once > 0) read_share_ = read_once / static_cast<double>(of(Stage::checksum).bytes);
  }

  // Rates of files have their fingerprints in them.
  void read(double Costs::*rate) {
    compare(Stage::read, rate, bytes(Stage::read),
            busy(Stage::read) + read_share_ * busy(Stage::checksum), run_.read_threads);
  }
  void write() {
    const double planned = measured_.costs.write;
    compare(Stage::write, &Costs::write, bytes(Stage::write),
            busy(Stage::write) + (1 - read_share_) * busy(Stage::checksum), run_.write_threads);
    measured_.costs.rewrite *= measured_.costs.write / planned;  // to the same file
  }
  void copy(Stage stage, double Costs::*rate) {
    compare(stage, rate, bytes(stage), busy(stage), 1);
  }
  void merge();
  void compute();

  MeasuredCosts result() && { return std::move(measured_); }

 private:
  const StageTotals& of(Stage stage) const { return run_.totals[static_cast<std::size_t>(stage)]; }
  double bytes(Stage stage) const { return static_cast<double>(of(stage).bytes); }
  double busy(Stage stage) const { return of(stage).busy_seconds; }

  bool is_enough(double seconds) const { return seconds > 0 && seconds >= least_seconds_; }

  void compare(Stage stage, double Costs::*rate, double bytes, double busy, int threads) {
    const double seconds = busy / threads;
    if (!(bytes > 0) || !is_enough(seconds)) return;
    double& planned = measured_.costs.*rate;
    const double measured = std::clamp(planned, bytes / busy, bytes / seconds);
    if (!differ(planned, measured)) return;
    measured_.changed.push_back({stage, planned, measured});
    planned = measured;
  }

  const Plan& plan_;
  const RunSoFar& run_;
  const double least_seconds_;
  double read_share_ = 0;  // of the fingerprints: all that is written has one, too
  MeasuredCosts measured_;
};

void Measuring::merge() {
  if (plan_.placement != AccumulatorPlacement::device) {
    compare(Stage::merge, &Costs::merge, bytes(Stage::merge), busy(Stage::merge),
            run_.merge_threads);
    return;
  }
  // There the first partial of a query chunk is no merge, but the costs count it.
  const double partials = partials_per_row(plan_.problem(), cut_of(plan_));
  if (!(partials > 1)) return;
  compare(Stage::merge, &Costs::device_merge, bytes(Stage::merge) * partials / (partials - 1),
          busy(Stage::merge), 1);
}

void Measuring::compute() {
  const double seconds = busy(Stage::compute);
  if (run_.scores == 0 || run_.subproblems == 0 || !is_enough(seconds) || run_.in_parts) return;
  // Launches end before their subproblems are counted as finished.
  const auto launches = static_cast<double>(of(Stage::compute).operations);
  const double flop = 4.0 * static_cast<double>(plan_.problem().head_dim) *
                      static_cast<double>(run_.scores) * launches /
                      static_cast<double>(run_.subproblems);
  KernelCost kernel = kernel_cost(measured_.costs, plan_.problem());
  const double planned = kernel_seconds(kernel, flop, launches);
  if (!differ(planned, seconds)) return;
  kernel.flop_per_second *= planned / seconds;
  kernel.burst_flop_per_second *= planned / seconds;
  kernel.launch_seconds *= seconds / planned;
  measured_.costs.kernels = {kernel};
  measured_.changed.push_back({Stage::compute, flop / planned, flop / seconds});
}

// Of the changed rates of several ranks: of each stage the one that is furthest from planned.
std::vector<ChangedRate> furthest(const std::vector<std::vector<ChangedRate>>& of_ranks) {
  std::vector<ChangedRate> all;
  for (const std::vector<ChangedRate>& changed : of_ranks) {
    for (const ChangedRate& rate : changed) {
      const auto other = std::ranges::find(all, rate.stage, &ChangedRate::stage);
      if (other == all.end()) {
        all.push_back(rate);
      } else if (ratio(rate) > ratio(*other)) {
        *other = rate;
      }
    }
  }
  return all;
}

std::optional<Plan> try_plan(const PlanRequest& request) {
  try {
    return make_plan(request);
  } catch (const InputError&) {  // it does not fit
    return std::nullopt;
  }
}

// The rest of a plan in another form; none where it does not fit.
std::optional<Plan> in_form(const Plan& plan, const ScheduleForm& form, std::int64_t from) {
  PlanRequest request = pinned_request(plan);
  request.order = form.order;
  request.host_accumulators = !form.on_device;
  auto other = try_plan(request);
  if (!other || form_of(*other) != form) return std::nullopt;
  // Fingerprints of inputs are taken of blocks, each once.
  if (other->query_block_tokens != plan.query_block_tokens ||
      other->key_block_tokens != plan.key_block_tokens)
    return std::nullopt;
  other->groups_done = from;
  return other;
}

// Three digits, or more before the point.
std::string number_text(double number) {
  return number < 100 ? fmt::format("{:.3g}", number) : fmt::format("{:.0f}", number);
}

std::string rate_text(const ChangedRate& rate) {
  return fmt::format("{} at {} {}, not {}", name_of(rate.stage), number_text(rate.measured * 1e-9),
                     rate.stage == Stage::compute ? "GFLOP/s" : "GB/s",
                     number_text(rate.planned * 1e-9));
}

std::string form_text(const Plan& plan) {
  return fmt::format("{}, with accumulators {}",
                     plan.order == ScheduleOrder::groups_inner ? "all together, quorum by quorum"
                                                               : "one after another",
                     place_text(plan.placement));
}

}  // namespace

RunSoFar RunSoFar::since(const RunSoFar& then) const {
  RunSoFar run = *this;
  for (std::size_t i = 0; i < run.totals.size(); ++i) {
    run.totals[i].busy_seconds -= then.totals[i].busy_seconds;
    run.totals[i].operations -= then.totals[i].operations;
    run.totals[i].bytes -= then.totals[i].bytes;
  }
  run.scores -= then.scores;
  run.subproblems -= then.subproblems;
  return run;
}

bool computes_in_parts(const Plan& plan) {
  const DeviceArena& device = plan.device;
  const Cut cut = cut_of(plan);
  return std::min(device.query_slots, device.state_slots) <
             std::min(cut.quorum_size, cut.query_chunks) ||
         device.kv_slots < std::min(cut.quorum_size, cut.key_chunks);
}

MeasuredCosts measured_costs(const Plan& plan, const Costs& planned, InputKind inputs,
                             const RunSoFar& run, std::int64_t from, double least_seconds) {
  Measuring measuring(plan, planned, run, least_seconds);
  measuring.read(read_rate_member(planned, inputs));
  measuring.copy(Stage::copy_in, &Costs::copy_in);
  measuring.compute();
  measuring.copy(Stage::copy_out, &Costs::copy_out);
  measuring.merge();
  if (has_plain_writes(plan, run, from)) measuring.write();
  return std::move(measuring).result();
}

std::optional<PlannedAgain> plan_again(const Plan& plan, const SharedCosts& costs,
                                       const std::vector<ChangedRate>& changed, InputKind inputs,
                                       std::int64_t from, double switch_seconds,
                                       const std::vector<ScheduleForm>& abandoned,
                                       const PlanFilter& may_take) {
  const double going_on = predict(plan, costs, inputs, from).seconds;
  std::optional<PlannedAgain> best;
  for (const ScheduleForm& form : schedule_forms) {
    if (form == form_of(plan) || std::ranges::find(abandoned, form) != abandoned.end()) continue;
    auto other = in_form(plan, form, from);
    if (!other) continue;
    const double seconds = predict(*other, costs, inputs).seconds;
    const double allowed = best ? best->seconds : going_on - switch_seconds;
    if (seconds * (1 + prediction_tolerance) < allowed && (!may_take || may_take(*other))) {
      best = PlannedAgain{std::move(*other), changed, seconds, going_on};
    }
  }
  return best;
}

std::optional<PlannedAgain> plan_again(const Plan& plan, const MeasuredCosts& measured,
                                       InputKind inputs, std::int64_t from, double switch_seconds,
                                       const std::vector<ScheduleForm>& abandoned,
                                       const PlanFilter& may_take) {
  return plan_again(plan, SharedCosts{measured.costs, {}}, measured.changed, inputs, from,
                    switch_seconds, abandoned, may_take);
}

std::string describe(const PlannedAgain& again) {
  std::string rates;
  for (const ChangedRate& rate : again.changed) {
    rates += (rates.empty() ? "" : "; ") + rate_text(rate);
  }
  const std::int64_t total = group_total(again.plan);
  return fmt::format("{}: the remaining {} of {} are computed {}, predicted {} s instead of {} s",
                     rates, total - again.plan.groups_done, counted(total, "head group"),
                     form_text(again.plan), number_text(again.seconds),
                     number_text(again.seconds_before));
}

std::optional<PlannedAgain> Tuner::ask(const Plan& plan, const RunSoFar& run, std::int64_t from,
                                       double switch_seconds, const PlanFilter& may_take,
                                       const WorkersSoFar& workers) {
  bool any = false;
  const auto measure = [&](Costs& known, std::vector<ChangedRate>& changed, const RunSoFar& of) {
    MeasuredCosts measured =
        measured_costs(plan, known, tuning_.inputs, of, from, tuning_.least_seconds);
    known = std::move(measured.costs);
    for (const ChangedRate& rate : measured.changed) {
      any = true;
      const auto before = std::ranges::find(changed, rate.stage, &ChangedRate::stage);
      if (before == changed.end()) {
        changed.push_back(rate);
      } else {
        before->measured = rate.measured;
      }
    }
  };
  measure(known_.merging, changed_.front(), run);
  SharedCosts costs{known_.merging, {}};
  for (std::size_t i = 0; i < workers.size(); ++i) {
    if (!workers[i]) continue;
    measure(known_.workers.at(i), changed_[1 + i], *workers[i]);
    costs.workers.push_back(known_.workers[i]);
  }
  // Predicted is all of the head groups, of which only a share is lacking.
  if (!any || !(run.lacking > 0)) return std::nullopt;
  auto again = plan_again(plan, costs, furthest(changed_), tuning_.inputs, from,
                          switch_seconds / run.lacking, abandoned_, may_take);
  if (!again) return std::nullopt;
  again->seconds *= run.lacking;
  again->seconds_before *= run.lacking;
  abandoned_.push_back(form_of(plan));
  return again;
}

}  // namespace stream_cqsa
