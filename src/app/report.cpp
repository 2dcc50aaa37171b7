#include "app/report.hpp"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <numeric>
#include <sstream>
#include <string_view>

#include "app/machine.hpp"
#include "app/text.hpp"
#include "core/counted.hpp"
#include "core/plan_json.hpp"
#include "mpi/environment.hpp"
#include "stream_cqsa/bytes.hpp"
#include "version.hpp"

namespace stream_cqsa {
namespace {

using nlohmann::json;

std::uint64_t sum(const std::vector<std::uint64_t>& values) {
  return std::accumulate(values.begin(), values.end(), std::uint64_t{0});
}

double flops_of(const Plan& plan, std::uint64_t scores) {
  return 4.0 * static_cast<double>(plan.problem().head_dim) * static_cast<double>(scores);
}

// Beside the arena: a GPU holds more than that, of this program and others.
std::string device_memory_text(const RunRecord& record) {
  const PlanRequest& request = record.plan.request;
  std::string text = fmt::format("device {} of {}", format_bytes(record.result.device_bytes),
                                 format_bytes(request.device_budget));
  if (request.device.kind == "cuda") {
    text += fmt::format(" ({} in use with CUDA's context and other programs)",
                        format_bytes(record.result.device_in_use));
  }
  return text;
}

// Of this run alone, without what earlier ones left in the checkpoint.
std::uint64_t own_scores(const RunRecord& record) {
  return sum(record.certificate.merged_scores) - record.result.checkpoint.resumed.scores;
}

double resumed_share(const RunRecord& record) {
  const std::uint64_t kept = sum(record.certificate.kept_scores);
  const auto resumed = static_cast<double>(record.result.checkpoint.resumed.scores);
  return kept > 0 ? resumed / static_cast<double>(kept) : 0;
}

std::string checkpoint_text(const RunRecord& record) {
  const CheckpointTotals& totals = record.result.checkpoint;
  return fmt::format("checkpoint {} written, {} in {}; {:.1f}% of the scores from earlier runs\n",
                     totals.written, format_bytes(totals.bytes), format_duration(totals.seconds),
                     100 * resumed_share(record));
}

json checkpoint_json(const RunRecord& record) {
  if (record.checkpoint.empty()) return nullptr;
  const CheckpointTotals& totals = record.result.checkpoint;
  const Resumed& resumed = totals.resumed;
  return {{"directory", record.checkpoint},
          {"written", totals.written},
          {"records", totals.records},
          {"bytes", totals.bytes},
          {"seconds", totals.seconds},
          {"resumed_from", resumed_share(record)},
          {"resumed_pieces", resumed.pieces},
          {"dropped_records", resumed.dropped_records},
          {"dropped_bytes", resumed.dropped_bytes},
          {"damaged_header", resumed.damaged_header},
          {"recomputed_pieces", resumed.recomputed}};
}

// Of this rank and those that worked for it.
AllTotals totals_of(const RunRecord& record) {
  AllTotals totals = record.telemetry.totals();
  if (!record.ranks) return totals;
  for (const auto* ranks : {&record.ranks->mergers, &record.ranks->workers}) {
    for (const json& rank : *ranks) {
      const AllTotals own = read_stages(rank["stages"]);
      for (std::size_t i = 0; i < totals.size(); ++i) {
        totals[i].busy_seconds += own[i].busy_seconds;
        totals[i].operations += own[i].operations;
        totals[i].bytes += own[i].bytes;
      }
    }
  }
  return totals;
}

std::string_view ending_of(const std::string& failure) {
  if (failure.empty()) return "";
  return failure == lost_text ? "; lost" : "; gave up";
}

constexpr double stalled_worth_saying = 0.05;  // of the wall clock

std::string mergers_text(const RanksResult& ranks) {
  std::string text;
  for (const json& merger : ranks.mergers) {
    const AllTotals stages = read_stages(merger["stages"]);
    const auto of = [&](Stage stage) { return stages[static_cast<std::size_t>(stage)]; };
    text += fmt::format(
        "rank {:<5} merger on {}: {}, {} came, merged for {}, {} written",
        merger["rank"].get<int>(), merger["host"].get<std::string>(),
        counted(merger["chunks"][1].get<std::int64_t>() - merger["chunks"][0].get<std::int64_t>(),
                "query chunk"),
        format_bytes(of(Stage::transfer).bytes), format_duration(of(Stage::merge).busy_seconds),
        format_bytes(of(Stage::write).bytes));
    const auto stalled = merger["stalled_seconds"].get<double>();
    const double share = stalled / ranks.master.run.seconds;
    if (share > stalled_worth_saying)
      text += fmt::format("; a bottleneck for {} ({:.0f}%)", format_duration(stalled), 100 * share);
    text += "\n";
  }
  return text;
}

// Where workers waited for rank 0.
std::string bottleneck_text(const RanksResult& ranks) {
  const double share = ranks.master.stalled_seconds / ranks.master.run.seconds;
  if (!(share > stalled_worth_saying)) return "";
  return fmt::format(
      "rank 0     was the bottleneck for {} ({:.0f}%), in which what workers had computed waited "
      "to be merged or written; --mergers, more --host-memory there or a faster disk would lift "
      "that\n",
      format_duration(ranks.master.stalled_seconds), 100 * share);
}

std::string ranks_text(const RanksResult& ranks) {
  std::string text = bottleneck_text(ranks) + mergers_text(ranks);
  if (const ServedInputs& served = ranks.master.served; served.buffers > 0) {
    text += fmt::format("rank 0     sent {} of the inputs, through {} of {} host memory\n",
                        format_bytes(served.bytes), counted(served.buffers, "buffer"),
                        format_bytes(served.buffers * served.buffer_bytes));
  }
  for (std::size_t i = 0; i < ranks.workers.size(); ++i) {
    const json& worker = ranks.workers[i];
    const AllTotals stages = read_stages(worker["stages"]);
    const auto bytes = [&](Stage stage) {
      return format_bytes(stages[static_cast<std::size_t>(stage)].bytes);
    };
    const double computing = stages[static_cast<std::size_t>(Stage::compute)].busy_seconds;
    text +=
        fmt::format("rank {:<5} {} on {}: {}, computed for {}, {} read, {} copied in{}\n",
                    worker["rank"].get<int>(), worker["device"].get<std::string>(),
                    worker["host"].get<std::string>(),
                    counted(ranks.master.subproblems[i], "subproblem"), format_duration(computing),
                    bytes(Stage::read), bytes(Stage::copy_in), ending_of(ranks.master.failures[i]));
  }
  return text;
}

json served_json(const ServedInputs& served) {
  if (served.buffers == 0) return nullptr;
  return {{"buffers", served.buffers},
          {"buffer_bytes", served.buffer_bytes},
          {"blocks", served.blocks},
          {"bytes", served.bytes}};
}

json master_json(const RunRecord& record) {
  if (!record.ranks) return nullptr;
  const MasterResult& master = record.ranks->master;
  const AllTotals totals = record.telemetry.totals();
  return {{"wall_seconds", record.result.seconds},
          {"busy_seconds_merge", totals[static_cast<std::size_t>(Stage::merge)].busy_seconds},
          {"busy_seconds_other", master.dispatch_seconds},
          {"stalled_seconds", master.stalled_seconds},
          {"repeated_subproblems", master.repeated},
          {"withdrawn_subproblems", master.withdrawn},
          {"inputs_served", served_json(master.served)},
          {"stages", stages_json(totals)}};
}

json mergers_json(const RunRecord& record) {
  if (!record.ranks) return nullptr;
  json mergers = json::array();
  for (json merger : record.ranks->mergers) {
    // These are in the certificate, of all ranks.
    for (const char* name : {"merged_scores", "nan", "infinite", "output", "lse"})
      merger.erase(name);
    const AllTotals stages = read_stages(merger["stages"]);
    merger["merge_seconds"] = stages[static_cast<std::size_t>(Stage::merge)].busy_seconds;
    merger["bytes_received"] = stages[static_cast<std::size_t>(Stage::transfer)].bytes;
    merger["bytes_written"] = stages[static_cast<std::size_t>(Stage::write)].bytes;
    mergers.push_back(std::move(merger));
  }
  return mergers;
}

json workers_json(const RunRecord& record) {
  if (!record.ranks) return nullptr;
  json workers = record.ranks->workers;
  for (std::size_t i = 0; i < workers.size(); ++i) {
    const AllTotals stages = read_stages(workers[i]["stages"]);
    workers[i]["subproblems"] = record.ranks->master.subproblems[i];
    workers[i]["bytes_read"] = stages[static_cast<std::size_t>(Stage::read)].bytes;
    workers[i]["bytes_copied_in"] = stages[static_cast<std::size_t>(Stage::copy_in)].bytes;
    workers[i]["compute_seconds"] = stages[static_cast<std::size_t>(Stage::compute)].busy_seconds;
  }
  return workers;
}

// What is predicted is a run from its start.
bool is_whole(const RunRecord& record) { return record.result.checkpoint.resumed.pieces == 0; }

std::string stage_table(const RunRecord& record) {
  std::string text = fmt::format("{:<10} {:>12} {:>7} {:>12} {:>12} {:>11}\n", "stage", "busy",
                                 "of wall", "operations", "bytes", "rate");
  const AllTotals totals = totals_of(record);
  for (std::size_t i = 0; i < totals.size(); ++i) {
    const auto& [busy, operations, bytes] = totals[i];
    const auto stage = static_cast<Stage>(i);
    if (operations == 0) continue;
    std::string rate;
    if (stage == Stage::compute) {
      rate = format_flops(flops_of(record.plan, own_scores(record)) / busy);
    } else if (bytes > 0 && busy > 0) {
      rate = fmt::format("{:.2f} GB/s", static_cast<double>(bytes) / busy * 1e-9);
    }
    text += fmt::format("{:<10} {:>12} {:>6.1f}% {:>12} {:>12} {:>11}\n", name_of(stage),
                        format_duration(busy), 100 * busy / record.total_seconds, operations,
                        bytes ? format_bytes(bytes) : "", rate);
  }
  return text;
}

json planned_again_json(const PlannedAgain& again) {
  json rates = json::object();
  for (const ChangedRate& rate : again.changed) {
    rates[std::string(name_of(rate.stage))] = {{"planned", rate.planned},
                                               {"measured", rate.measured}};
  }
  return {{"head_groups_done", again.plan.groups_done},
          {"head_groups", group_total(again.plan)},
          {"order", name_of(again.plan.order)},
          {"accumulators", name_of(again.plan.placement)},
          {"rates", rates},
          {"predicted_seconds", again.seconds},
          {"predicted_seconds_as_before", again.seconds_before}};
}

json all_planned_again_json(const RunRecord& record) {
  json all = json::array();
  for (const PlannedAgain& again : record.result.planned_again)
    all.push_back(planned_again_json(again));
  return all;
}

// The most of all plans that the run went by.
template <typename Bytes>
std::int64_t most_planned(const RunRecord& record, const Bytes& bytes) {
  std::int64_t most = bytes(record.plan);
  for (const PlannedAgain& again : record.result.planned_again)
    most = std::max(most, bytes(again.plan));
  return most;
}

json fingerprint_json(const Fingerprint& fingerprint, std::int64_t vectors) {
  return {{"checksum", hexadecimal(fingerprint.checksum)},
          {"vectors", fingerprint.vectors},
          {"of_vectors", vectors},
          {"nan", fingerprint.non_finite.nan},
          {"infinite", fingerprint.non_finite.infinite}};
}

json certificate_json(const RunRecord& record) {
  const Certificate& certificate = record.certificate;
  const Problem& problem = record.plan.problem();
  const std::int64_t queries = problem.batch * problem.query_length * problem.query_heads;
  const std::int64_t keys = problem.batch * problem.key_length * problem.kv_heads;
  const std::string& differing = certificate.differing_inputs;
  return {{"ok", certificate.ok()},
          {"differing_inputs", differing.empty() ? json() : json(differing)},
          {"scores_merged", certificate.merged_scores},
          {"scores_kept_by_mask", certificate.kept_scores},
          {"rows", to_json(certificate.verification)},
          {"query", fingerprint_json(certificate.query, queries)},
          {"key", fingerprint_json(certificate.key, keys)},
          {"value", fingerprint_json(certificate.value, keys)},
          {"output", fingerprint_json(certificate.output, queries)}};
}

}  // namespace

json stages_json(const AllTotals& totals) {
  json stages = json::object();
  for (std::size_t i = 0; i < totals.size(); ++i) {
    stages[std::string(name_of(static_cast<Stage>(i)))] = {{"busy_seconds", totals[i].busy_seconds},
                                                           {"operations", totals[i].operations},
                                                           {"bytes", totals[i].bytes}};
  }
  return stages;
}

AllTotals read_stages(const json& stages) {
  AllTotals totals;
  for (std::size_t i = 0; i < totals.size(); ++i) {
    const json& stage = stages.at(std::string(name_of(static_cast<Stage>(i))));
    totals[i] = {stage.at("busy_seconds").get<double>(), stage.at("operations").get<std::int64_t>(),
                 stage.at("bytes").get<std::int64_t>()};
  }
  return totals;
}

std::string describe(const RunRecord& record) {
  const Plan& plan = record.plan;
  const Certificate& certificate = record.certificate;
  const std::uint64_t merged = sum(certificate.merged_scores);
  const std::uint64_t kept = sum(certificate.kept_scores);
  std::string text = stage_table(record);
  text += fmt::format("wall       {:>12}   {:.2f} s from the first read to the last write: {}\n",
                      format_duration(record.total_seconds), record.result.seconds,
                      format_flops(flops_of(plan, own_scores(record)) / record.result.seconds));
  if (is_whole(record)) text += fmt::format("predicted  {}\n", describe(record.expected));
  for (const PlannedAgain& again : record.result.planned_again)
    text += fmt::format("again      {}\n", describe(again));
  text += fmt::format("memory     {}, host {} of {}, peak resident {}\n",
                      device_memory_text(record), format_bytes(record.result.host_bytes),
                      format_bytes(plan.request.host_budget), format_bytes(peak_resident_bytes()));
  if (record.ranks) text += ranks_text(*record.ranks);
  if (record.numerics.find("; ") != std::string::npos) {
    text += fmt::format("bits       depend on who computed what: {}\n", record.numerics);
  }
  text += fmt::format("scores     {} merged of {} that the mask keeps\n", merged, kept);
  text += fmt::format("output     {} NaN, {} infinite; checksum {}\n",
                      certificate.output.non_finite.nan, certificate.output.non_finite.infinite,
                      hexadecimal(certificate.output.checksum));
  if (!record.checkpoint.empty()) text += checkpoint_text(record);
  return text + "rows       " + describe(certificate.verification) + "\n";
}

json versions_json() {
  const Machine machine = this_machine();
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  return {{"version", version_number},
          {"commit", version_commit},
          {"build", version_build},
          {"backends", version_backends},
          {"mpi", MpiEnvironment::library_version()},
          {"host", host},
          {"cpu", machine.cpu},
          {"cores", machine.cores},
          {"memory_bytes", machine.memory}};
}

json to_json(const RunRecord& record) {
  const Plan& plan = record.plan;
  const RunResult& result = record.result;
  std::ostringstream plan_text;
  write_json(plan, false, plan_text);
  const double compute = totals_of(record)[static_cast<std::size_t>(Stage::compute)].busy_seconds;
  const double flops = flops_of(plan, sum(record.certificate.kept_scores));
  return {
      {"versions", versions_json()},
      {"command", record.command},
      {"direct_io", record.inputs == InputKind::direct_files},
      {"date", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)))},
      {"seconds", result.seconds},
      {"total_seconds", record.total_seconds},
      {"predicted", is_whole(record) ? to_json(record.expected) : json()},
      {"planned_again", all_planned_again_json(record)},
      {"flop", flops},
      {"flop_per_second", flops_of(plan, own_scores(record)) / result.seconds},
      {"compute_share_of_wall",
       compute / result.seconds /
           static_cast<double>(record.ranks ? record.ranks->workers.size() : 1)},
      {"scores_computed", result.scores_computed},
      {"stages", stages_json(totals_of(record))},
      {"arithmetic", record.numerics},
      {"ranks", record.ranks ? 1 + record.ranks->mergers.size() + record.ranks->workers.size() : 1},
      {"master", master_json(record)},
      {"mergers", mergers_json(record)},
      {"workers", workers_json(record)},
      {"memory",
       {{"device",
         {{"budget", plan.request.device_budget},
          {"planned", most_planned(record, [](const Plan& of) { return of.device.bytes(); })},
          {"allocated", result.device_bytes},
          {"in_use", result.device_in_use}}},
        {"host",
         {{"budget", plan.request.host_budget},
          {"planned", most_planned(record, [](const Plan& of) { return of.host.bytes(); })},
          {"allocated", result.host_bytes}}},
        {"scratch",
         {{"planned", most_planned(record, [](const Plan& of) { return of.scratch_bytes; })},
          {"used", result.scratch_bytes}}},
        {"peak_resident", peak_resident_bytes()}}},
      {"checkpoint", checkpoint_json(record)},
      {"certificate", certificate_json(record)},
      {"plan", json::parse(plan_text.str())},
  };
}

}  // namespace stream_cqsa
