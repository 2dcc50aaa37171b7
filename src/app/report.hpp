// What a run says at its end: the certificate, the closing table, the JSON report.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "app/calibration.hpp"
#include "app/input_parts.hpp"
#include "app/verification.hpp"
#include "mpi/master.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/fingerprint.hpp"
#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

/// What shows that an output is the whole attention of its inputs.
struct Certificate {
  std::vector<std::uint64_t> merged_scores;  ///< per query chunk
  std::vector<std::uint64_t> kept_scores;    ///< per query chunk, by the mask
  Verification verification;
  Fingerprint query, key, value;  ///< of what was read
  std::string differing_inputs;   ///< see ReadInputs
  Fingerprint output;             ///< of what was written

  std::int64_t output_vectors = 0;  ///< that O has

  /// Every score that the mask keeps was merged, every row was written, every sampled one agrees,
  /// and so do ranks on what they read.
  bool ok() const {
    return merged_scores == kept_scores && output.vectors == output_vectors &&
           differing_inputs.empty() && verification.ok();
  }
};

/// What the ranks of a run did.
struct RanksResult {
  MasterResult master;
  std::vector<nlohmann::json> mergers;  ///< what each has to report
  std::vector<nlohmann::json> workers;  ///< the same
  ReadInputs read;                      ///< by workers
};

/// A finished run and what it was given.
struct RunRecord {
  const Plan& plan;
  const RunResult& result;
  const RanksResult* ranks;  ///< of several, or null
  std::string numerics;      ///< see Capacity
  const Telemetry& telemetry;
  double total_seconds;  ///< wall clock of all stages, verification and sync included
  const Certificate& certificate;
  std::vector<std::string> command;  ///< as given, without the program's name
  std::string checkpoint;            ///< directory, or empty
  Expected expected;                 ///< of the whole run
  InputKind inputs;
};

/// The table of where the time went, memory beside the budgets, and the certificate.
std::string describe(const RunRecord& record);

nlohmann::json to_json(const RunRecord& record);

/// Busy time, operations and bytes by stage.
using AllTotals = std::array<StageTotals, stage_count>;
nlohmann::json stages_json(const AllTotals& totals);
AllTotals read_stages(const nlohmann::json& stages);

/// Version, commit, build flags, MPI library and machine.
nlohmann::json versions_json();

}  // namespace stream_cqsa
