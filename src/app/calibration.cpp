#include "app/calibration.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <sstream>

#include "app/bench_device.hpp"
#include "app/bench_host.hpp"
#include "app/problem.hpp"
#include "app/text.hpp"
#include "app/text_file.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

namespace fs = std::filesystem;

Problem shape_of(std::int64_t dim, DType dtype, Mask mask) {
  Problem shape;
  shape.query_heads = shape.kv_heads = 8;
  shape.query_length = shape.key_length = 64;
  shape.head_dim = dim;
  shape.dtype = shape.output_dtype = dtype;
  shape.mask = mask;
  shape.scale = default_scale(dim);
  return shape;
}

// The CPU computes every type in fp32; on a GPU each has a kernel.
void measure_kernels(const ResourceOptions& resources, bool cuda, double seconds, Costs& costs,
                     std::FILE* out) {
  const auto backend = [&](const Problem& problem) { return make_backend(resources, problem); };
  const auto measure = [&](std::int64_t dim, DType dtype, Mask mask) {
    costs.kernels.push_back(measure_kernel(backend, shape_of(dim, dtype, mask), seconds));
    const KernelCost& kernel = costs.kernels.back();
    fmt::print(out, "kernel    D={:<4} {:<5} {:<7} {} ({} after a pause), {:.1f} us a launch\n",
               dim, name_of(dtype), mask == Mask::causal ? "causal" : "full",
               format_flops(kernel.flop_per_second), format_flops(kernel.burst_flop_per_second),
               1e6 * kernel.launch_seconds);
    std::fflush(out);
  };
  for (const std::int64_t dim : {64, 128}) {
    for (const Mask mask : {Mask::none, Mask::causal}) {
      measure(dim, DType::f32, mask);
      if (!cuda) continue;
      for (const DType dtype : {DType::f16, DType::bf16}) measure(dim, dtype, mask);
    }
  }
}

std::string file_name_of(const std::string& device) {
  std::string name = "costs-";
  for (const char c : device) {
    const bool plain = std::isalnum(static_cast<unsigned char>(c)) != 0;
    if (plain) {
      name += c;
    } else if (name.back() != '-') {
      name += '-';
    }
  }
  return name + ".json";
}

}  // namespace

Costs measure_costs(const ResourceOptions& resources, double seconds, std::FILE* out) {
  const Problem shape = shape_of(64, DType::f16, Mask::causal);
  const auto backend = make_backend(resources, shape);
  const DeviceTraits device = backend->traits(shape);
  const RunOptions threads = run_options(resources, device);
  Costs costs = builtin_costs(device);  // what cannot be measured here stays
  costs.measured = true;
  costs.kernels.clear();
  fmt::print(out, "device    {}\n", costs.device);
  measure_kernels(resources, device.kind == "cuda", seconds, costs, out);
  const auto line = [&](const char* what, double rate) {
    fmt::print(out, "{:<9} {:.2f} GB/s\n", what, rate * 1e-9);
    std::fflush(out);
  };
  const DeviceCopies copies = measure_copies(*backend);
  line("copy in", costs.copy_in = copies.in);
  line("copy out", costs.copy_out = copies.out);
  line("merge", costs.merge = merge_rate(threads.merge_threads, 64));
  if (copies.merge > 0) line("on device", costs.device_merge = copies.merge);
  line("generate", costs.generate = generate_rate(threads.read_threads));
  const fs::path directory = resources.scratch.empty() ? "." : resources.scratch;
  const FileRates files = file_rates(directory, threads);
  line("write", costs.write = files.write);
  line("rewrite", costs.rewrite = files.rewrite);
  line("read", costs.read = files.read);
  costs.read_direct = files.read_direct;
  if (costs.read_direct > 0) line("direct", costs.read_direct);
  return costs;
}

fs::path costs_path(const std::string& device) {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return fs::path(value ? value : "");
  };
  const fs::path cache = variable("XDG_CACHE_HOME"), home = variable("HOME");
  if (cache.is_absolute()) return cache / "stream-cqsa" / file_name_of(device);
  if (home.is_absolute()) return home / ".cache" / "stream-cqsa" / file_name_of(device);
  return {};
}

fs::path save_costs(const Costs& costs) {
  const fs::path path = costs_path(costs.device);
  if (path.empty()) throw Error("no place to keep the costs; set HOME or XDG_CACHE_HOME");
  std::error_code failed;
  fs::create_directories(path.parent_path(), failed);
  if (failed) {
    throw Error(
        fmt::format("{}: cannot be created: {}", path.parent_path().string(), failed.message()));
  }
  TextFile file(path);
  *file.stream() << to_json_text(costs);
  file.commit();
  return path;
}

Costs find_costs(const DeviceTraits& device) {
  const Costs builtin = builtin_costs(device);
  const fs::path path = costs_path(builtin.device);
  std::ifstream file(path);
  if (path.empty() || !file) return builtin;
  std::ostringstream text;
  text << file.rdbuf();
  try {
    Costs costs = costs_from_json(text.str(), path.string());
    if (costs.device == builtin.device) return costs;
    throw InputError(fmt::format("{}: is of another device, '{}'", path.string(), costs.device));
  } catch (const InputError& error) {
    static std::once_flag said;
    std::call_once(said, [&] {
      fmt::print(stderr, "stream-cqsa: predicting by built-in rates: {}\n", error.what());
    });
    return builtin;
  }
}

PlannedRanks ranks_of(const DeviceTraits& device, const Capacity& capacity) {
  return capacity.ranks ? *capacity.ranks : PlannedRanks{find_costs(device), {}, {}};
}

SharedCosts costs_here(const Plan& plan, const Capacity& capacity) {
  const PlannedRanks ranks = ranks_of(plan.request.device, capacity);
  return costs_of(plan, ranks).value_or(SharedCosts{ranks.costs, {}});
}

Expected expect(Plan plan, const Capacity& capacity, InputKind inputs,
                std::optional<double> flop_per_second) {
  // Those of a plan that is read are others.
  plan.request.workers = std::max<std::int64_t>(capacity.workers, 1);
  if (capacity.ranks) plan.request.mergers = std::ssize(capacity.ranks->merger_budgets);
  SharedCosts costs = costs_here(plan, capacity);
  if (flop_per_second) {
    KernelCost kernel = kernel_cost(costs.merging, plan.problem());
    kernel.flop_per_second = kernel.burst_flop_per_second = *flop_per_second;
    kernel.launch_seconds = 0;
    costs.merging.kernels = {kernel};
  }
  const bool measured =
      costs.merging.measured && std::ranges::all_of(costs.workers, &Costs::measured);
  return {predict(plan, costs, inputs), disk_bound(plan, costs, inputs), measured};
}

namespace {

// "; the disk binds: read takes 120 s of 140 s at 1.20 GB/s, from 2.90 GB/s on it would not"
std::string describe(const DiskBound& disk) {
  return fmt::format(
      "; the disk binds: {} takes {} of {} at {:.2f} GB/s, from {:.2f} GB/s on it "
      "would not",
      name_of(disk.stage), format_duration(disk.busy_seconds), format_duration(disk.seconds),
      disk.rate * 1e-9, disk.enough * 1e-9);
}

nlohmann::json to_json(const DiskBound& disk) {
  return {{"stage", name_of(disk.stage)},
          {"busy_seconds", disk.busy_seconds},
          {"bytes_per_second", disk.rate},
          {"enough_bytes_per_second", disk.enough},
          {"seconds_unbound", disk.seconds_unbound}};
}

}  // namespace

std::string describe(const Expected& expected) {
  const Prediction& prediction = expected.prediction;
  std::string stages;
  for (int i = 0; i < stage_count; ++i) {
    const auto stage = static_cast<Stage>(i);
    const double share = prediction.busy_of(stage) / prediction.seconds;
    if (share < 0.005) continue;
    stages += fmt::format("{}{} {:.0f}%", stages.empty() ? "" : ", ", name_of(stage), 100 * share);
  }
  return fmt::format("{}, bound by {} ({}){}{}", format_duration(prediction.seconds),
                     name_of(prediction.bottleneck()), stages,
                     expected.disk ? describe(*expected.disk) : "",
                     expected.measured ? "" : ", by built-in rates: bench --save measures yours");
}

nlohmann::json to_json(const Expected& expected) {
  nlohmann::json busy = nlohmann::json::object();
  for (int i = 0; i < stage_count; ++i) {
    const auto stage = static_cast<Stage>(i);
    const double seconds = expected.prediction.busy_of(stage);
    if (seconds > 0) busy[std::string(name_of(stage))] = seconds;
  }
  return {{"seconds", expected.prediction.seconds},
          {"busy_seconds", busy},
          {"bottleneck", name_of(expected.prediction.bottleneck())},
          {"disk", expected.disk ? to_json(*expected.disk) : nlohmann::json()},
          {"rates", expected.measured ? "measured" : "built-in"}};
}

}  // namespace stream_cqsa
