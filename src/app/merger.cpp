#include "app/merger.hpp"

#include <fmt/format.h>

#include <filesystem>

#include "app/checkpoint_directory.hpp"
#include "app/machine.hpp"
#include "app/report.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

using nlohmann::json;

std::vector<RowIndex> rows_of(const json& merging) {
  std::vector<RowIndex> rows;
  for (const json& row : merging["rows"]) {
    rows.push_back(
        {row[0].get<std::int64_t>(), row[1].get<std::int64_t>(), row[2].get<std::int64_t>()});
  }
  return rows;
}

json totals_json(const CheckpointTotals& totals) {
  const Resumed& resumed = totals.resumed;
  return {{"written", totals.written},
          {"records", totals.records},
          {"bytes", totals.bytes},
          {"seconds", totals.seconds},
          {"resumed_scores", resumed.scores},
          {"resumed_pieces", resumed.pieces},
          {"dropped_records", resumed.dropped_records},
          {"dropped_bytes", resumed.dropped_bytes},
          {"damaged_header", resumed.damaged_header},
          {"recomputed_pieces", resumed.recomputed}};
}

CheckpointTotals read_totals(const json& totals) {
  const auto number = [&](const char* name) { return totals.at(name).get<std::int64_t>(); };
  CheckpointTotals read{number("written"),
                        number("records"),
                        number("bytes"),
                        totals.at("seconds").get<double>(),
                        {}};
  read.resumed = {totals.at("resumed_scores").get<std::uint64_t>(),
                  number("resumed_pieces"),
                  number("dropped_records"),
                  number("dropped_bytes"),
                  totals.at("damaged_header").get<bool>(),
                  number("recomputed_pieces")};
  return read;
}

}  // namespace

json merging_json(const std::vector<RowIndex>& rows, const CheckpointOptions& checkpoint) {
  json numbers = json::array();
  for (const RowIndex& row : rows) numbers.push_back({row.batch, row.token, row.head});
  json merging = {{"rows", numbers}};
  if (!checkpoint.directory.empty()) {
    merging["checkpoint"] = {{"identity", checkpoint.identity}, {"interval", checkpoint.interval}};
  }
  return merging;
}

MergedOutputs::MergedOutputs(const Plan& plan, const JobOptions& options, const json& merging,
                             int rank, Telemetry& telemetry)
    : plan_(plan), options_(options), merging_(merging), rank_(rank), telemetry_(telemetry) {}

CheckpointOptions MergedOutputs::checkpoint() const {
  CheckpointOptions own;
  if (!merging_.contains("checkpoint")) return own;
  own.directory = CheckpointDirectory::of_merger(options_.resources.checkpoint, rank_);
  own.identity = merging_["checkpoint"]["identity"].get<std::uint64_t>();
  own.interval = merging_["checkpoint"]["interval"].get<double>();
  return own;
}

Outputs MergedOutputs::open() {
  const auto require_same = [](const char* option, bool own, bool of_master) {
    if (own == of_master) return;
    throw InputError(fmt::format("{} must be given to rank 0 and to mergers alike", option));
  };
  require_same("--checkpoint", !options_.resources.checkpoint.empty(),
               merging_.contains("checkpoint"));
  require_same("--lse", !options_.output.lse.empty(), plan_.request.lse);
  const std::filesystem::path directory = checkpoint().directory;
  if (!directory.empty()) {
    // Rank 0 has made the directory in which this one lies.
    std::error_code error;
    std::filesystem::create_directory(directory, error);
    if (!std::filesystem::is_directory(directory)) {
      throw InputError(fmt::format(
          "{} cannot be made: {}; mergers keep their part of a checkpoint in the directory of rank "
          "0, which they must share",
          directory.string(), error.message()));
    }
  }
  const std::vector<RowIndex> rows = rows_of(merging_);
  sinks_ = join_sinks(plan_, options_.output);
  output_.emplace(*sinks_.output, rows, telemetry_);
  if (sinks_.lse) lse_.emplace(*sinks_.lse, rows, telemetry_);
  return {*output_, lse_ ? &*lse_ : nullptr};
}

void MergedOutputs::add_seen(json& report) const {
  if (output_) report["output"] = output_->seen();
  if (lse_) report["lse"] = lse_->seen();
}

json report_of(const MergerResult& result, const Telemetry& telemetry, const Range& chunks) {
  const RunResult& run = result.run;
  return {{"chunks", {chunks.begin, chunks.end}},      {"failure", result.failure},
          {"merged_scores", run.merged_scores},        {"nan", run.output.nan},
          {"infinite", run.output.infinite},           {"host_bytes", run.host_bytes},
          {"scratch_bytes", run.scratch_bytes},        {"peak_resident", peak_resident_bytes()},
          {"stalled_seconds", result.stalled_seconds}, {"checkpoint", totals_json(run.checkpoint)},
          {"stages", stages_json(telemetry.totals())}};
}

void add_merger(const json& report, RunResult& run) {
  const auto scores = report.at("merged_scores").get<std::vector<std::uint64_t>>();
  for (std::size_t i = 0; i < scores.size(); ++i) run.merged_scores.at(i) += scores[i];
  run.output += {report.at("nan").get<std::int64_t>(), report.at("infinite").get<std::int64_t>()};
  run.scratch_bytes += report.at("scratch_bytes").get<std::int64_t>();
  run.checkpoint += read_totals(report.at("checkpoint"));
}

}  // namespace stream_cqsa
