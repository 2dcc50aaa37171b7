#include "app/checkpoint_directory.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <set>
#include <span>
#include <sstream>

#include "app/division_options.hpp"
#include "app/json_text.hpp"
#include "app/text.hpp"
#include "app/text_file.hpp"
#include "engine/checksum.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"
#include "version.hpp"

namespace stream_cqsa {
namespace {

namespace fs = std::filesystem;
using Identity = CheckpointDirectory::Identity;

// In the order in which they are removed.
constexpr std::array names = {"journal",         "states",     "tried", "plan.json",
                              "checkpoint.json", "publishing", "lock"};
constexpr std::string_view merger_prefix = "merger-";
constexpr std::int64_t sampled_tokens = 64;

bool is_of_merger(const fs::directory_entry& entry) {
  return entry.is_directory() && entry.path().filename().string().starts_with(merger_prefix);
}

std::uint64_t number_of(const std::string& text) {
  return checksum(std::as_bytes(std::span(text)), 0);
}

fs::path created(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (!fs::is_directory(path)) {
    throw InputError(fmt::format("--checkpoint {}: is not a directory and cannot be made one{}",
                                 path.string(), error ? ": " + error.message() : ""));
  }
  for (const auto& entry : fs::directory_iterator(path)) {
    fs::path name = entry.path().filename();
    for (const char* unfinished : {".lock", ".partial"}) {
      if (name.extension() == unfinished) name.replace_extension();
    }
    if (std::find(names.begin(), names.end(), name.string()) != names.end()) continue;
    if (is_of_merger(entry)) continue;
    throw InputError(
        fmt::format("--checkpoint {}: holds {}, which is no part of a checkpoint; give a directory "
                    "of its own",
                    path.string(), entry.path().filename().string()));
  }
  return path;
}

// What was written by write_identity(); null when that is missing or damaged.
Identity read_identity(const fs::path& path) {
  std::ifstream file(path);
  const Identity json = Identity::parse(file, nullptr, false);
  if (!json.is_object() || !json.contains("identity") || !json.contains("checksum")) return {};
  const Identity identity = json["identity"];
  return json["checksum"] == hexadecimal(number_of(identity.dump())) ? identity : Identity();
}

void write_text(const fs::path& path, const std::string& text) {
  TextFile file(path.string());
  *file.stream() << text;
  file.commit();
}

std::string checkpoint_plan_text(const Plan& plan) {
  std::ostringstream text;
  write_json(plan, false, text);
  return text.str();
}

// Differs for different plans.
std::string plan_number(const Plan& plan) {
  return hexadecimal(number_of(checkpoint_plan_text(plan)));
}

// Of rows from the first to the last: not all of a large file, and no time at all.
std::string sample(TensorSource& source) {
  const TensorDesc& desc = source.desc();
  std::vector<std::byte> row(
      static_cast<std::size_t>(desc.heads * desc.dim * size_of(storage_type(desc.dtype))));
  std::uint64_t sum = 0;
  const std::int64_t last = desc.batch * desc.tokens - 1;
  const std::int64_t rows = std::min(sampled_tokens, last + 1);
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t at = i + 1 < rows ? last / (rows - 1) * i : last;
    const std::int64_t token = at % desc.tokens;
    source.read({at / desc.tokens, {token, token + 1}, {0, desc.heads}}, row);
    sum = checksum(row, sum);
  }
  return hexadecimal(sum);
}

Identity input_identity(TensorSource& source, const std::string& path) {
  const TensorDesc& desc = source.desc();
  std::error_code none;  // a synthetic input has no file
  const auto changed = fs::last_write_time(path, none);
  return {{"shape", desc.shape()},
          {"dtype", name_of(desc.dtype)},
          {"layout", name_of(desc.layout)},
          {"bytes", desc.bytes()},
          {"modified", none ? 0 : changed.time_since_epoch().count()},
          {"sample", sample(source)}};
}

void check_number(const char* option, std::int64_t given, std::int64_t of_plan) {
  if (given == 0 || given == of_plan) return;
  throw InputError(
      fmt::format("{} {}: the checkpoint's plan has {}; give that, or leave the option out", option,
                  given, of_plan));
}

std::string text_of(const Grid& grid) { return fmt::format("{}x{}", grid.rows, grid.columns); }

void check_division(const ResourceOptions& resources, const Division& division) {
  const bool tiles = division.scheme() == Scheme::tiles;
  const auto require = [](bool same, const char* option, const std::string& given,
                          const std::string& of_plan) {
    if (same) return;
    throw InputError(
        fmt::format("{} {}: the checkpoint's plan has {}; give that, or leave the option out",
                    option, given, of_plan));
  };
  require(resources.division.empty() || leaves_division_open(resources) ||
              resources.division == name_of(division.scheme()),
          "--division", resources.division, std::string(name_of(division.scheme())));
  if (const auto grid = grid_option(resources)) {
    require(tiles && *grid == division.grid(), "--grid", resources.grid,
            tiles ? text_of(division.grid()) : "no tiles");
  }
  require(!resources.chunks || !tiles, "--chunks", std::to_string(resources.chunks.value_or(0)),
          "tiles");
  if (!tiles) check_number("--chunks", resources.chunks.value_or(0), division.chunk_count());
}

// Other most heads per group may give the same groups.
void check_heads(const ResourceOptions& resources, const Plan& plan) {
  if (!resources.heads_per_group) return;
  const std::int64_t heads = plan.problem().kv_heads;
  const auto groups = static_cast<std::int64_t>(plan.groups.size());
  const std::int64_t given = std::clamp<std::int64_t>(*resources.heads_per_group, 1, heads);
  if (ceil_div(heads, given) == groups) return;
  check_number("--heads-per-group", *resources.heads_per_group, ceil_div(heads, groups));
}

void check_options(const ResourceOptions& resources, const Plan& plan) {
  const auto bytes = [](const char* option, const std::string& text) {
    return text.empty() ? 0 : parse_bytes(text, option);
  };
  const PlanRequest& request = plan.request;
  check_number("--device-memory", bytes("--device-memory", resources.device_memory),
               request.device_budget);
  check_number("--host-memory", bytes("--host-memory", resources.host_memory), request.host_budget);
  check_division(resources, plan.division);
  check_heads(resources, plan);
}

}  // namespace

CheckpointDirectory::CheckpointDirectory(const fs::path& path)
    : path_(created(path)),
      lock_(open_locked(path / "lock")),
      stored_(read_identity(path / "checkpoint.json")) {}

fs::path CheckpointDirectory::of_merger(const fs::path& path, int rank) {
  return path / fmt::format("{}{}", merger_prefix, rank);
}

std::vector<fs::path> CheckpointDirectory::all_parts() const {
  std::vector<fs::path> parts = {path_};
  for (const auto& entry : fs::directory_iterator(path_)) {
    if (is_of_merger(entry)) parts.push_back(entry.path());
  }
  return parts;
}

fs::path CheckpointDirectory::plan_file() const {
  const fs::path path = path_ / "plan.json";
  std::ifstream file(path);
  if (!file) return {};
  try {
    const Plan plan = read_plan(file, path.string());
    const bool same = stored_.is_null() || stored_.value("plan", "") == plan_number(plan);
    return same ? path : fs::path();
  } catch (const InputError&) {
    return {};  // damaged: it is made again from the options
  }
}

void CheckpointDirectory::require_same(const Identity& identity) const {
  if (stored_.is_null()) return;
  for (const auto& [name, value] : identity.items()) {
    const Identity before = stored_.value(name, Identity());
    if (before == value) continue;
    throw InputError(fmt::format(
        "--checkpoint {}: belongs to another run: {} was {} and is {}; use another directory, or "
        "remove this one",
        path_.string(), name, before.dump(), value.dump()));
  }
}

std::uint64_t CheckpointDirectory::claim(const Identity& identity, const Plan& plan) {
  require_same(identity);
  const std::string text = identity.dump();
  fs::remove(path_ / "publishing");  // of a run that is no longer known, or whose outputs are gone
  if (stored_.is_null()) {
    const Identity json = {{"identity", identity}, {"checksum", hexadecimal(number_of(text))}};
    write_text(path_ / "checkpoint.json", json.dump(1) + "\n");
    stored_ = identity;
  }
  if (plan_file().empty()) write_text(path_ / "plan.json", checkpoint_plan_text(plan));
  return number_of(text);
}

void CheckpointDirectory::restore(const ResourceOptions& resources, PlanRequest& request) const {
  const auto stored = [&](const char* option) { return stored_.value(option, Identity()); };
  const auto fill = [&](const char* option, bool given, auto& value) {
    const Identity number = stored(option);
    if (!given && number.is_number_integer()) value = number.get<std::int64_t>();
  };
  fill("--device-memory", !resources.device_memory.empty(), request.device_budget);
  fill("--host-memory", !resources.host_memory.empty(), request.host_budget);
  fill("--chunks", resources.chunks.has_value(), request.chunks);
  fill("--heads-per-group", resources.heads_per_group.has_value(), request.heads_per_group);
  const Identity division = stored("--division"), grid = stored("--grid");
  const Identity inner = stored("groups_inner");
  if (inner.is_boolean()) {
    request.order = inner.get<bool>() ? ScheduleOrder::groups_inner : ScheduleOrder::groups_outer;
  }
  const bool open = resources.division.empty() || leaves_division_open(resources);
  if (open && division.is_string()) {
    request.scheme = parse_scheme(division.get<std::string>()).value_or(request.scheme);
  }
  if (resources.grid.empty() && grid.is_array() && grid.size() == 2) {
    request.grid = Grid{grid[0].get<std::int64_t>(), grid[1].get<std::int64_t>()};
  }
}

bool CheckpointDirectory::has_progress() const {
  const std::vector<fs::path> parts = all_parts();
  return std::any_of(parts.begin(), parts.end(), [](const fs::path& part) {
    std::error_code none;
    constexpr std::uintmax_t header = 32;
    const std::uintmax_t bytes = fs::file_size(part / "journal", none);
    return !none && bytes > header;
  });
}

void CheckpointDirectory::begin_publishing() { write_text(path_ / "publishing", ""); }

void CheckpointDirectory::clear() {
  // Whatever is left if this is cut short is no lie: with the identity the same command publishes
  // what has its names already, or begins anew; without it the mark means nothing.
  for (const fs::path& part : all_parts()) {
    if (part != path_) fs::remove_all(part);
  }
  for (const char* name : names) fs::remove(path_ / name);
}

void add_plan(const Plan& plan, Identity& identity) {
  identity["--device-memory"] = plan.request.device_budget;
  identity["--host-memory"] = plan.request.host_budget;
  const PlanRequest& request = plan.request;
  const auto number = [](const std::optional<std::int64_t>& value) {
    return value ? Identity(*value) : Identity();
  };
  identity["--division"] = name_of(request.scheme);
  identity["--chunks"] = number(request.chunks);
  identity["--grid"] =
      request.grid ? Identity{request.grid->rows, request.grid->columns} : Identity();
  identity["--heads-per-group"] = number(request.heads_per_group);
  identity["groups_inner"] =
      request.order ? Identity(*request.order == ScheduleOrder::groups_inner) : Identity();
  identity["plan"] = plan_number(plan);
}

Identity identity_of(const std::string& command, OpenProblem& open, const JobOptions& options,
                     const std::string& numerics) {
  const InputOptions& input = options.input;
  const auto path = [&](const std::string& own) { return input.input.empty() ? own : input.input; };
  const Problem& problem = open.problem;
  const Identity identity = {
      {"command", command},
      {"version", version_number},
      {"commit", version_commit},
      {"arithmetic", numerics},
      {"--causal", problem.mask == Mask::causal},
      {"--scale", problem.scale},
      {"--output-dtype", name_of(problem.output_dtype)},
      {"--queries",
       fmt::format("{}:{}", problem.queries_before, problem.queries_before + problem.query_length)},
      {"--output", options.output.output},
      {"--lse", options.output.lse},
      {"--mergers", options.resources.mergers},
      {"query", input_identity(*open.query, path(input.query))},
      {"key", input_identity(*open.key, path(input.key))},
      {"value", input_identity(*open.value, path(input.value))}};
  return Identity::parse(json_text(identity));  // as it is read back
}

Plan durable_plan(const CheckpointDirectory& directory, const OpenProblem& open,
                  const JobOptions& options, const Capacity& capacity) {
  const bool lse = !options.output.lse.empty();
  const fs::path file = directory.plan_file();
  if (file.empty()) {
    if (!directory.is_claimed() || !options.resources.plan.empty()) {
      return plan_for(open, options.resources, lse, capacity);
    }
    PlanRequest request = request_for(open, options.resources, lse, capacity);
    directory.restore(options.resources, request);
    return make_plan(request);
  }
  ResourceOptions resources = options.resources;
  resources.plan = file.string();
  resources.device_memory.clear();
  resources.host_memory.clear();
  resources.division.clear();
  resources.grid.clear();
  resources.chunks = resources.heads_per_group = std::nullopt;
  Plan plan = plan_for(open, resources, lse, capacity);
  check_options(options.resources, plan);
  if (!options.resources.plan.empty() &&
      plan_number(plan_for(open, options.resources, lse, capacity)) != plan_number(plan)) {
    throw InputError(fmt::format("--plan {}: is not the plan of the checkpoint in {}",
                                 options.resources.plan, directory.path().string()));
  }
  return plan;
}

}  // namespace stream_cqsa
