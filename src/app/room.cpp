#include "app/room.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "core/merge_shares.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {
namespace {

namespace fs = std::filesystem;

// Of a file, where it is there already.
std::int64_t allocated_bytes(const fs::path& path) {
  struct stat status {};
  constexpr std::int64_t block = 512;
  return ::stat(path.c_str(), &status) == 0 ? status.st_blocks * block : 0;
}

// What a run writes, by the disk that it goes to.
class Needs {
 public:
  // `bytes` in a directory that is there, for `what`.
  void add(const fs::path& directory, std::int64_t bytes, const std::string& what) {
    struct stat status {};
    if (bytes <= 0 || ::stat(directory.c_str(), &status) != 0) return;
    Disk& disk = disks_[status.st_dev];
    disk.directory = directory;
    disk.bytes += bytes;
    disk.what.push_back(what);
  }

  // An output, less what an earlier run has written of it.
  void add_output(const std::string& path, std::int64_t bytes) {
    if (path.empty()) return;
    const fs::path parent = fs::path(path).parent_path();
    add(parent.empty() ? fs::path(".") : parent, bytes - allocated_bytes(path + ".partial"), path);
  }

  // Hours of computing must not end at a disk that was too small from the start.
  void require_room() const {
    for (const auto& [number, disk] : disks_) {
      const auto free = static_cast<std::int64_t>(fs::space(disk.directory).available);
      if (free >= disk.bytes) continue;
      const bool one = disk.what.size() == 1;
      throw InputError(fmt::format("{}: {} {}{} and {} are free there", fmt::join(disk.what, ", "),
                                   one ? "needs" : "need", format_bytes(disk.bytes),
                                   one ? "" : " together", format_bytes(free)));
    }
  }

 private:
  struct Disk {
    fs::path directory;
    std::int64_t bytes = 0;
    std::vector<std::string> what;
  };
  std::map<dev_t, Disk> disks_;
};

// The plan of rank 0, which merges its share of what the workers compute.
Plan merging_plan(const Plan& plan, std::int64_t workers, bool serves) {
  if (workers == 0) return plan;
  const MergeShares shares(plan, static_cast<int>(plan.request.mergers));
  return merger_plan(plan, workers, shares.chunks(0), plan.request.host_budget, serves);
}

// The states of a checkpoint: every open piece of the ranks that merge, about as many on each, in
// two versions, the durable one and the next.
std::int64_t states_bytes(const Plan& plan, const Plan& merging,
                          const CheckpointDirectory& directory) {
  const std::int64_t share = accumulator_file_bytes(merging, true);
  std::int64_t bytes = 2 * std::max(plan.scratch_bytes, (1 + plan.request.mergers) * share);
  for (const auto& part : directory.all_parts()) bytes -= allocated_bytes(part / "states");
  return bytes;
}

}  // namespace

void check_room(const Plan& plan, const OpenProblem& open, const JobOptions& options,
                std::int64_t workers, const CheckpointDirectory* directory) {
  const auto merging = [&] { return merging_plan(plan, workers, options.input_through_master); };
  Needs needs;
  const std::string& scratch = options.resources.scratch;
  if (directory) {
    needs.add(directory->path(), states_bytes(plan, merging(), *directory),
              "--checkpoint " + directory->path().string());
  } else if (!scratch.empty()) {
    needs.add(scratch, merging().scratch_bytes, "--scratch " + scratch);
  }
  const Problem& problem = open.problem;
  needs.add_output(options.output.output, output_desc(open).bytes());
  needs.add_output(options.output.lse,
                   lse_desc(problem.batch, problem.query_heads, problem.query_length).bytes());
  needs.require_room();
}

}  // namespace stream_cqsa
