// The directory of --checkpoint: who uses it, and which run it belongs to.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "app/arguments.hpp"
#include "app/problem.hpp"
#include "io/partial_file.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// Holds, beside the engine's journal and states, and a directory merger-N of such for each merger:
///   lock             locked by the run that uses the directory
///   checkpoint.json  which run this is: version, inputs, options, outputs, plan
///   plan.json        its plan
///   publishing       there once the outputs are certified and get their names
class CheckpointDirectory {
 public:
  /// What tells runs apart: names that people know, and values.
  using Identity = nlohmann::ordered_json;

  /// Creates the directory where it is not there. Throws InputError when it cannot be, is used by
  /// another run, or holds other things than a checkpoint.
  explicit CheckpointDirectory(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }

  /// Where the merger of this rank keeps its journal and states, in the checkpoint at `path`.
  static std::filesystem::path of_merger(const std::filesystem::path& path, int rank);

  /// Those of all ranks: this directory, and those of mergers that are there.
  std::vector<std::filesystem::path> all_parts() const;

  /// The file of the checkpoint's plan, if that is there and sound, else empty.
  std::filesystem::path plan_file() const;

  /// The budgets of the checkpoint where none are given: those of its plan, if that is lost.
  Capacity with_budgets(const ResourceOptions& resources, Capacity capacity) const;

  /// Throws InputError, naming it, when something in `identity` is not what the checkpoint has.
  void require_same(const Identity& identity) const;

  /// Makes the directory that of this run, with its plan, if it is nobody's. Returns a number for
  /// the identity. Throws as require_same().
  std::uint64_t claim(const Identity& identity, const Plan& plan);

  /// Something has been made durable.
  bool has_progress() const;

  bool is_publishing() const { return std::filesystem::exists(path_ / "publishing"); }
  void begin_publishing();

  /// Removes the checkpoint; the directory itself stays.
  void clear();

 private:
  std::filesystem::path path_;
  Descriptor lock_;
  Identity stored_;  ///< null: none, or none that is sound
};

/// The identity of a run but for its plan.
CheckpointDirectory::Identity identity_of(OpenProblem& open, const JobOptions& options,
                                          const std::string& device_kind);

/// Adds the plan and its budgets.
void add_plan(const Plan& plan, CheckpointDirectory::Identity& identity);

/// The plan of a run with a checkpoint: that of the directory if there is one. Throws InputError
/// when an option disagrees with it.
Plan durable_plan(const CheckpointDirectory& directory, const OpenProblem& open,
                  const JobOptions& options, const Capacity& capacity);

}  // namespace stream_cqsa
