// One rank's run: streams a plan's subproblems through a backend, merges, writes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/checkpoint.hpp"
#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/softmax_state.hpp"
#include "stream_cqsa/telemetry.hpp"
#include "stream_cqsa/tensor.hpp"
#include "stream_cqsa/tuning.hpp"

namespace stream_cqsa {

/// Q, K and V. Their shapes, types and layouts must be those of the plan's request.
struct Inputs {
  TensorSource& query;
  TensorSource& key;
  TensorSource& value;

  TensorSource& of(SlotTensor tensor) const {
    return tensor == SlotTensor::query ? query : tensor == SlotTensor::key ? key : value;
  }
};

struct Outputs {
  TensorSink& output;         ///< O
  TensorSink* lse = nullptr;  ///< fp32, bhsd, dim 1; or none
};

/// How a program ends.
struct LastWords {
  std::string line;
  int status = 1;
};

struct RunOptions {
  std::filesystem::path scratch;  ///< directory of the accumulator file, where the plan has one
  /// Whether that file, or the states of the checkpoint, of up to so many bytes, go past the page
  /// cache where the file system allows; or none: they do not.
  std::function<bool(std::int64_t bytes)> goes_direct = nullptr;
  int read_threads = 2;
  int merge_threads = 2;
  int write_threads = 2;
  int mergers = 0;  ///< of a run on several ranks: so many, from rank 1 on, merge beside rank 0
  /// Called with a line for people where the run does not go as planned; or none.
  std::function<void(const std::string&)> warn = nullptr;
  CheckpointOptions checkpoint;
  /// Of a run on several ranks that this ends, while another rank does not answer: then all ranks
  /// are ended at once. Without it, the exception's own text and 1.
  std::function<LastWords(const std::exception_ptr&)> last_words = nullptr;
  /// Where the rest of the run may be planned again, by a run of one rank; or none.
  std::optional<Tuning> tuning;
};

/// What a run leaves beside its outputs.
struct RunResult {
  /// Per query chunk, the scores that were merged, over all batch entries and query heads.
  std::vector<std::uint64_t> merged_scores;
  NonFinite output;  ///< NaN and infinite values in the rows of O that this rank finished
  std::uint64_t scores_computed = 0;  ///< Backend::scores_computed()
  // Of several plans, one after another, the largest of each.
  std::int64_t device_bytes = 0;   ///< Backend::allocated_bytes()
  std::int64_t device_in_use = 0;  ///< Backend::memory_in_use() at the end
  std::int64_t host_bytes = 0;     ///< of the host arena, allocated
  std::int64_t scratch_bytes = 0;  ///< largest size of the accumulator file
  CheckpointTotals checkpoint;
  std::vector<PlannedAgain> planned_again;  ///< plans after the one given
  double seconds = 0;                       ///< wall clock from the first read to the last write
};

/// Computes the attention that `plan` describes. The backend is prepared here. Sinks are written in
/// full and not committed: that is the caller's. Output bits depend on the plan and the kind of
/// device alone. Where the device has less memory left than the plan takes, less is allocated, see
/// within_device().
///
/// With RunOptions::tuning, whenever a head group (with groups_inner: a batch entry) has been
/// handed out, the rest may be planned again: then what is under way is finished and written, the
/// arenas are freed, and the rest is run by the new plan, with the same output bits. `warn` is
/// told.
///
/// With a checkpoint the plan must keep its accumulators on the host, as any plan for the rest then
/// does, and the sinks must be those of the earlier runs, if there were any: what these merged and
/// finished, by whichever plan, is not computed again.
/// Throws InputError when the inputs or the checkpoint are not the plan's, Stopped when it was
/// asked to stop and did so after a checkpoint, Error when anything fails on the way.
RunResult run(const Plan& plan, const Inputs& inputs, const Outputs& outputs, Backend& backend,
              const RunOptions& options, Telemetry& telemetry);

/// Throws InputError unless shapes, types and layouts are those that the plan was made for.
void check_inputs(const Plan& plan, const Inputs& inputs);
void check_outputs(const Plan& plan, const Outputs& outputs);

/// The scores the mask keeps for each query chunk, over all batch entries and query heads: what
/// RunResult::merged_scores must equal.
std::vector<std::uint64_t> expected_scores(const Plan& plan);

}  // namespace stream_cqsa
