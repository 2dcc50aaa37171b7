// What a merger writes, keeps and reports.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "app/audit.hpp"
#include "app/outputs.hpp"
#include "app/problem.hpp"
#include "mpi/merger.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

/// What rank 0 tells mergers: the rows that are verified, and which checkpoint there is.
nlohmann::json merging_json(const std::vector<RowIndex>& rows, const CheckpointOptions& checkpoint);

/// The outputs of rank 0 as a merger writes to them, watched.
class MergedOutputs {
 public:
  /// `merging` is what merging_json() gave. Opens nothing yet.
  MergedOutputs(const Plan& plan, const JobOptions& options, const nlohmann::json& merging,
                int rank, Telemetry& telemetry);

  /// This rank's own part of the checkpoint, if there is one.
  CheckpointOptions checkpoint() const;

  /// Throws InputError where the outputs, or the checkpoint's directory, cannot be seen from here.
  Outputs open();

  /// Adds to this rank's report what it has written.
  void add_seen(nlohmann::json& report) const;

 private:
  const Plan& plan_;
  const JobOptions& options_;
  nlohmann::json merging_;
  int rank_;
  Telemetry& telemetry_;
  Sinks sinks_;
  std::optional<AuditedSink> output_, lse_;
};

/// A merger's report, but for what it has written.
nlohmann::json report_of(const MergerResult& result, const Telemetry& telemetry,
                         const Range& chunks);

/// Adds what a merger reports to the result of the whole run.
void add_merger(const nlohmann::json& report, RunResult& run);

}  // namespace stream_cqsa
