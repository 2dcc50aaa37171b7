#include "app/room.hpp"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <string>

#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {
namespace {

// Hours of computing must not end at a disk that was too small from the start.
void require_room(const std::filesystem::path& directory, std::int64_t bytes,
                  const std::string& what) {
  const auto free = static_cast<std::int64_t>(std::filesystem::space(directory).available);
  if (free >= bytes) return;
  throw InputError(fmt::format("{}: needs {} and {} are free there", what, format_bytes(bytes),
                               format_bytes(free)));
}

// Of a file, where it is there already.
std::int64_t allocated_bytes(const std::filesystem::path& path) {
  struct stat status {};
  constexpr std::int64_t block = 512;
  return ::stat(path.c_str(), &status) == 0 ? status.st_blocks * block : 0;
}

std::int64_t unfinished_bytes(const std::string& output) {
  return output.empty() ? 0 : allocated_bytes(output + ".partial");
}

}  // namespace

void check_room(const Plan& plan, std::int64_t workers, const CheckpointDirectory& directory) {
  // Every open piece of the ranks that merge in two versions: the durable one, and the next.
  const HostArena host = workers > 0 ? master_plan(plan, workers).host : plan.host;
  const std::int64_t accumulators =
      (1 + plan.request.mergers) * host.accumulators * host.accumulator_bytes;
  std::int64_t states = 2 * std::max(plan.scratch_bytes, accumulators);
  for (const auto& part : directory.all_parts()) states -= allocated_bytes(part / "states");
  require_room(directory.path(), states, "--checkpoint " + directory.path().string());
}

void check_room(const Plan& plan, const OpenProblem& open, const JobOptions& options) {
  namespace fs = std::filesystem;
  const std::string& scratch = options.resources.scratch;
  if (!scratch.empty()) {
    const bool used = options.resources.checkpoint.empty();  // else the states are there
    require_room(scratch, used ? plan.scratch_bytes : 0, "--scratch " + scratch);
  }
  // O and lse most often lie on one disk: each directory must have room for both.
  const Problem& problem = open.problem;
  const std::int64_t lse_bytes =
      options.output.lse.empty()
          ? 0
          : lse_desc(problem.batch, problem.query_heads, problem.query_length).bytes();
  const std::int64_t unfinished =
      unfinished_bytes(options.output.output) + unfinished_bytes(options.output.lse);
  const fs::path parent = fs::path(options.output.output).parent_path();
  require_room(parent.empty() ? fs::path(".") : parent,
               output_desc(open).bytes() + lse_bytes - unfinished, options.output.output);
}

}  // namespace stream_cqsa
