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
/// or, of a rehearsal, beside the first three what TriedRecord keeps.
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

  /// It is known whose checkpoint this is.
  bool is_claimed() const { return !stored_.is_null(); }

  /// Where the options leave them open, budgets and division of the checkpoint's plan: so that it
  /// can be made again if it is lost.
  void restore(const ResourceOptions& resources, PlanRequest& request) const;

  /// Throws InputError, naming it, when something in `identity` is not what the checkpoint has.
  void require_same(const Identity& identity) const;

  /// Makes the directory that of this run, with its plan, if it is nobody's, and one that is not
  /// publishing. Returns a number for the identity. Throws as require_same().
  std::uint64_t claim(const Identity& identity, const Plan& plan);

  /// Something has been made durable.
  bool has_progress() const;

  /// The run that this directory belongs to had ended but for the names of its outputs.
  bool is_publishing() const {
    return is_claimed() && std::filesystem::exists(path_ / "publishing");
  }
  void begin_publishing();

  /// Removes the checkpoint; the directory itself stays.
  void clear();

 private:
  std::filesystem::path path_;
  Descriptor lock_;
  Identity stored_;  ///< null: none, or none that is sound
};

/// The identity of what a command does, but for its plan. `numerics`: see Capacity.
CheckpointDirectory::Identity identity_of(const std::string& command, OpenProblem& open,
                                          const JobOptions& options, const std::string& numerics);

/// Adds the plan, and what it was made of.
void add_plan(const Plan& plan, CheckpointDirectory::Identity& identity);

/// The plan of a run with a checkpoint: that of the directory if there is one. Throws InputError
/// when an option disagrees with it.
Plan durable_plan(const CheckpointDirectory& directory, const OpenProblem& open,
                  const JobOptions& options, const Capacity& capacity);

}  // namespace stream_cqsa
