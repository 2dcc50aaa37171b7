#include "app/problem.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "app/division_options.hpp"
#include "app/input_files.hpp"
#include "app/machine.hpp"
#include "core/counted.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/cuda_backend.hpp"
#include "stream_cqsa/difference_cover.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/synthetic.hpp"

namespace stream_cqsa {
namespace {

constexpr std::string_view synthetic_prefix = "synthetic:";

std::optional<std::uint64_t> synthetic_seed(const std::string& text) {
  if (!text.starts_with(synthetic_prefix)) return std::nullopt;
  const std::string digits = text.substr(synthetic_prefix.size());
  std::uint64_t seed = 0;
  const auto [end, failed] = std::from_chars(digits.data(), digits.data() + digits.size(), seed);
  if (failed != std::errc() || end != digits.data() + digits.size() || digits.empty()) {
    throw InputError(fmt::format("{}: the seed is not a number; write synthetic:1", text));
  }
  return seed;
}

std::vector<std::int64_t> shape_option(const std::string& text) {
  std::vector<std::int64_t> shape;
  const char* at = text.data();
  const char* end = text.data() + text.size();
  while (at < end) {
    std::int64_t extent = 0;
    const auto [next, failed] = std::from_chars(at, end, extent);
    if (failed != std::errc() || extent < 1 || (next < end && *next != ',')) break;
    shape.push_back(extent);
    at = next + 1;
  }
  if (at <= end || shape.size() != 4) {
    throw InputError(fmt::format(
        "--shape '{}': not four positive numbers; write B,N,H,D such as 1,65536,8,64", text));
  }
  return shape;
}

void check_same(const char* what, const TensorDesc& a, std::int64_t of_a, const TensorDesc& b,
                std::int64_t of_b) {
  if (of_a == of_b) return;
  throw InputError(
      fmt::format("{} has {} {} and {} has {}; they must agree", a.name, of_a, what, b.name, of_b));
}

Problem problem_of(const TensorDesc& query, const TensorDesc& key, const TensorDesc& value) {
  check_same("dimensions", query, query.rank, key, key.rank);
  check_same("dimensions", key, key.rank, value, value.rank);
  check_same("batch entries", query, query.batch, key, key.batch);
  check_same("batch entries", key, key.batch, value, value.batch);
  check_same("tokens", key, key.tokens, value, value.tokens);
  check_same("heads", key, key.heads, value, value.heads);
  check_same("elements a head", query, query.dim, key, key.dim);
  check_same("elements a head", key, key.dim, value, value.dim);
  for (const TensorDesc* other : {&key, &value}) {
    if (other->dtype != query.dtype) {
      throw InputError(fmt::format("{} is {} and {} is {}; they must agree", query.name,
                                   name_of(query.dtype), other->name, name_of(other->dtype)));
    }
  }
  if (query.heads % key.heads != 0) {
    throw InputError(fmt::format("{} has {}, not a multiple of the {} of {}", query.name,
                                 counted(query.heads, "head"), counted(key.heads, "head"),
                                 key.name));
  }
  return {query.batch, query.heads, key.heads,   query.tokens, key.tokens,
          query.dim,   query.dtype, query.dtype, Mask::none,   default_scale(query.dim)};
}

// The rows of a query of `tokens` that --queries names.
Range queries_option(const std::string& text, std::int64_t tokens) {
  Range rows;
  const char* end = text.data() + text.size();
  const auto [colon, no_begin] = std::from_chars(text.data(), end, rows.begin);
  if (no_begin == std::errc() && colon < end && *colon == ':') {
    const auto [last, no_end] = std::from_chars(colon + 1, end, rows.end);
    const bool inside = rows.begin >= 0 && rows.begin < rows.end && rows.end <= tokens;
    if (no_end == std::errc() && last == end && inside) return rows;
  }
  throw InputError(
      fmt::format("--queries '{}': not rows of the query, which has {}; write BEGIN:END with "
                  "0 <= BEGIN < END <= {}",
                  text, counted(tokens, "token"), tokens));
}

void require_inputs(const InputOptions& input) {
  direct_option(input.direct_io);
  const bool three = !input.query.empty() || !input.key.empty() || !input.value.empty();
  if (!input.input.empty() && three) {
    throw InputError("--input excludes --query, --key and --value");
  }
  if (input.input.empty() && (input.query.empty() || input.key.empty() || input.value.empty())) {
    throw InputError("no input; give --input FILE, or --query, --key and --value");
  }
  if (std::filesystem::path(input.input).extension() == ".npy") {
    throw InputError(fmt::format(
        "--input {}: a .npy file holds one tensor; give --query, --key and --value", input.input));
  }
  if (!synthetic_seed(input.input) &&
      (!input.shape.empty() || !input.dtype.empty() || input.kv_heads || input.key_length)) {
    throw InputError(
        "--shape, --dtype, --kv-heads and --key-length belong to --input synthetic:SEED");
  }
}

// Says why not, but where nobody would expect it to.
bool cuda_computes(const CudaOptions& options, const Problem& problem) {
  const std::string obstacle = cuda_obstacle(options, problem);
  if (!obstacle.empty() && has_cuda_driver()) {
    fmt::print(stderr, "stream-cqsa: computing on the CPU: {}\n", obstacle);
  }
  return obstacle.empty();
}

bool is_resident(const TensorSource& source) {
  return source.resident({0, {0, 1}, {0, 1}}).has_value();
}

void require_between(const char* option, std::optional<std::int64_t> value, std::int64_t most) {
  if (!value || (*value >= 1 && *value <= most)) return;
  throw InputError(fmt::format("{} {}: use 1 to {}", option, *value, most));
}

void check_resources(const ResourceOptions& resources, const Problem& problem) {
  const bool tiles = division_option(resources) == Scheme::tiles;
  const auto grid = grid_option(resources);
  if (leaves_division_open(resources) && (resources.chunks || grid))
    throw InputError(
        "--division auto chooses --chunks and --grid too; give cqs or tiles with them");
  require_between("--chunks", resources.chunks, max_modulus);
  if (tiles && resources.chunks)
    throw InputError("--chunks belongs to --division cqs; with tiles give --grid ROWSxCOLUMNS");
  if (!tiles && grid)
    throw InputError("--grid belongs to --division tiles; with cqs give --chunks C");
  require_between("--heads-per-group", resources.heads_per_group, problem.kv_heads);
  if (!resources.scratch.empty() && !std::filesystem::is_directory(resources.scratch)) {
    throw InputError(fmt::format("--scratch {}: is not a directory", resources.scratch));
  }
  if (!resources.scratch.empty() && ::access(resources.scratch.c_str(), W_OK | X_OK) != 0) {
    throw InputError(fmt::format("--scratch {}: cannot be written: {}", resources.scratch,
                                 std::generic_category().message(errno)));
  }
}

}  // namespace

Layout layout_option(const std::string& name) {
  const auto layout = parse_layout(name);
  if (!layout) throw InputError(fmt::format("--layout {}: unknown layout; use bshd or bhsd", name));
  return *layout;
}

DType dtype_option(const std::string& option, const std::string& name, std::string_view types) {
  const auto dtype = parse_dtype(name);
  if (!dtype) throw InputError(fmt::format("{} {}: unknown type; use {}", option, name, types));
  return *dtype;
}

OpenProblem open_synthetic(const InputOptions& input, std::uint64_t seed) {
  if (input.shape.empty()) throw InputError("a synthetic input needs --shape B,N,H,D");
  const auto shape = shape_option(input.shape);
  if (input.kv_heads < 0 || input.key_length < 0) {
    throw InputError("--kv-heads and --key-length must be positive");
  }
  TensorDesc query;
  query.name = fmt::format("synthetic:{} query", seed);
  query.dtype =
      dtype_option("--dtype", input.dtype.empty() ? "f16" : input.dtype, "f16, bf16 or f32");
  if (query.dtype == DType::f64) {
    throw InputError("--dtype f64: synthetic elements are f16, bf16 or f32");
  }
  query.layout = layout_option(input.layout);
  query.batch = shape[0];
  query.tokens = shape[1];
  query.heads = shape[2];
  query.dim = shape[3];
  TensorDesc key = query;
  key.name = fmt::format("synthetic:{} key", seed);
  if (input.kv_heads) key.heads = input.kv_heads;
  if (input.key_length) key.tokens = input.key_length;
  TensorDesc value = key;
  value.name = fmt::format("synthetic:{} value", seed);

  OpenProblem open;
  open.problem = problem_of(query, key, value);
  validate(open.problem);
  open.query = make_synthetic_source(query, seed, 0);
  open.key = make_synthetic_source(key, seed, 1);
  open.value = make_synthetic_source(value, seed, 2);
  return open;
}

Problem problem_of(const TensorDesc& query, const TensorDesc& key, const TensorDesc& value,
                   const AttentionOptions& attention) {
  Problem problem = problem_of(query, key, value);
  if (attention.causal) problem.mask = Mask::causal;
  if (attention.scale) problem.scale = *attention.scale;
  if (!attention.output_dtype.empty()) {
    problem.output_dtype =
        dtype_option("--output-dtype", attention.output_dtype, "f16, bf16, f32 or f64");
  }
  if (attention.queries) {
    const Range rows = queries_option(*attention.queries, query.tokens);
    problem.query_length = rows.size();
    problem.queries_before = rows.begin;
    problem.queries_after = query.tokens - rows.end;
  }
  validate(problem);
  return problem;
}

OpenProblem open_problem(const InputOptions& input, const AttentionOptions& attention,
                         std::int64_t host_budget) {
  require_inputs(input);
  OpenProblem open;
  if (const auto seed = synthetic_seed(input.input)) {
    open = open_synthetic(input, *seed);
  } else {
    open = open_input_files(input, host_budget);
  }
  open.problem = problem_of(open.query->desc(), open.key->desc(), open.value->desc(), attention);
  const Problem& problem = open.problem;
  if (problem.sequence_length() > problem.query_length) {
    const std::int64_t first = problem.queries_before;
    open.query = make_row_source(std::move(open.query), {first, first + problem.query_length});
  }
  return open;
}

void check_threads(const ResourceOptions& resources) {
  constexpr int most = 4096;
  if (resources.threads >= 0 && resources.threads <= most) return;
  throw InputError(fmt::format("--threads {}: from 0, one for each core, to {} are supported",
                               resources.threads, most));
}

std::unique_ptr<Backend> make_backend(const ResourceOptions& resources, const Problem& problem) {
  const std::string& name = resources.backend;
  if (name != "auto" && name != "cpu" && name != "cuda") {
    throw InputError(fmt::format("--backend {}: unknown; use auto, cpu or cuda", name));
  }
  check_threads(resources);
  const bool cuda =
      name == "cuda" || (name == "auto" && cuda_computes({resources.cuda_device}, problem));
  if (cuda) return make_cuda_backend({resources.cuda_device});
  const int cores = this_machine().cores / resources.workers_on_host;
  return make_cpu_backend({resources.threads > 0 ? resources.threads : std::max(1, cores)});
}

std::int64_t all_host_budgets(const ResourceOptions& resources) {
  return std::min(host_budget_of(resources), this_machine().memory) * resources.ranks_on_host;
}

std::int64_t host_budget_of(const ResourceOptions& resources) {
  if (!resources.host_memory.empty()) return parse_bytes(resources.host_memory, "--host-memory");
  return this_machine().available_memory / 2 / resources.ranks_on_host;
}

Capacity capacity_of(const ResourceOptions& resources, const Problem& problem,
                     const Backend& backend) {
  Capacity capacity;
  capacity.device = backend.traits(problem);
  capacity.numerics = backend.numerics(problem);
  capacity.host_budget = host_budget_of(resources);
  if (!resources.device_memory.empty()) {
    capacity.device_budget = parse_bytes(resources.device_memory, "--device-memory");
  } else if (capacity.device.kind == "cuda") {
    capacity.device_budget = cuda_free_memory(resources.cuda_device) / 10 * 9;
  } else {
    capacity.device_budget = this_machine().available_memory / 4 / resources.ranks_on_host;
  }
  return capacity;
}

PlanRequest request_for(const OpenProblem& open, const ResourceOptions& resources, bool lse,
                        const Capacity& capacity) {
  check_resources(resources, open.problem);
  PlanRequest request;
  request.problem = open.problem;
  request.device = capacity.device;
  request.query.layout = open.query->desc().layout;
  request.key.layout = open.key->desc().layout;
  request.value.layout = open.value->desc().layout;
  if (capacity.workers == 0) {
    request.query.resident = is_resident(*open.query);
    request.key.resident = is_resident(*open.key);
    request.value.resident = is_resident(*open.value);
  }
  request.output_layout = open.query->desc().layout;
  request.lse = lse;
  request.device_budget = capacity.device_budget;
  request.host_budget = capacity.host_budget;
  request.workers = std::max<std::int64_t>(capacity.workers, 1);
  request.mergers = resources.mergers;
  request.host_accumulators = !resources.checkpoint.empty();
  request.scratch =
      resources.assume_scratch || !resources.scratch.empty() || !resources.checkpoint.empty();
  request.scheme = division_option(resources);
  request.chunks = resources.chunks;
  request.grid = grid_option(resources);
  request.heads_per_group = resources.heads_per_group;
  return request;
}

RunOptions run_options(const ResourceOptions& resources, const DeviceTraits& device) {
  RunOptions options;
  options.scratch = resources.scratch;
  options.warn = [](const std::string& line) { fmt::print(stderr, "stream-cqsa: {}\n", line); };
  const int cores = std::max(1, this_machine().cores / resources.ranks_on_host);
  if (device.kind == "cuda") {
    // What the first subproblems need is read at once, so many read; the others have time.
    options.read_threads = std::clamp(3 * cores / 4, 2, 16);
    options.merge_threads = std::clamp(cores / 2, 2, 16);
    // Most systems write one file from one thread at a time; fingerprints are taken beside that.
    options.write_threads = std::clamp(cores / 2, 2, 4);
  }
  return options;
}

TensorDesc output_desc(const OpenProblem& open) {
  TensorDesc desc = open.query->desc();
  desc.dtype = open.problem.output_dtype;
  return desc;
}

void check_output_paths(const InputOptions& input, const ResourceOptions& resources,
                        const std::vector<std::string>& outputs, bool overwrite) {
  namespace fs = std::filesystem;
  const auto same = [](const fs::path& a, const fs::path& b) {
    std::error_code ignored;
    return fs::equivalent(a, b, ignored) ||
           fs::weakly_canonical(a, ignored) == fs::weakly_canonical(b, ignored);
  };
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].empty()) continue;
    for (const std::string& given :
         {input.input, input.query, input.key, input.value, resources.plan}) {
      if (!given.empty() && same(outputs[i], given)) {
        throw InputError(fmt::format("{}: is an input; give the output another name", outputs[i]));
      }
    }
    for (std::size_t j = 0; j < i; ++j) {
      if (!outputs[j].empty() && same(outputs[i], outputs[j])) {
        throw InputError(fmt::format("{}: is named for two outputs", outputs[i]));
      }
    }
    if (!overwrite && fs::exists(outputs[i])) {
      throw InputError(fmt::format("{}: exists; --overwrite replaces it", outputs[i]));
    }
    const fs::path parent = fs::path(outputs[i]).parent_path();
    if (!parent.empty() && !fs::is_directory(parent)) {
      throw InputError(fmt::format("{}: there is no directory {}", outputs[i], parent.string()));
    }
  }
}

}  // namespace stream_cqsa
