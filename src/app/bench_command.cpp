#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <nlohmann/json.hpp>
#include <string_view>
#include <vector>

#include "app/bench_device.hpp"
#include "app/bench_host.hpp"
#include "app/bench_stream.hpp"
#include "app/calibration.hpp"
#include "app/commands.hpp"
#include "app/machine.hpp"
#include "app/report.hpp"
#include "app/text.hpp"
#include "core/counted.hpp"
#include "cpu/bench.hpp"
#include "mpi/file.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/softmax_state.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {
namespace {

using nlohmann::json;

struct BenchArguments {
  std::vector<std::string> only;
  std::int64_t length = 16384;
  std::int64_t heads = 8;
  StreamOptions stream;
  bool json = false;
  bool save = false;
  double seconds = 2;
};

bool parse_bench(const Arguments& arguments, BenchArguments& bench) {
  namespace po = boost::program_options;
  OptionGroup group("Options");
  group.add_options()(
      "only", po::value(&bench.only)->composing()->value_name("WHAT"),
      "kernel, copy, merge, io or stream; may be repeated (default: all, io with --scratch, stream "
      "with --shape)")("length", po::value(&bench.length)->default_value(16384)->value_name("N"),
                       "tokens, for kernel")(
      "heads", po::value(&bench.heads)->default_value(8)->value_name("H"), "heads, for kernel")(
      "rounds", po::value(&bench.stream.rounds)->default_value(3)->value_name("R"),
      "of stream, after a warm-up")("lockstep", po::bool_switch(&bench.stream.lockstep),
                                    "stream starts a round with each line of standard input")(
      "json", po::bool_switch(&bench.json), "print the rates as JSON")(
      "save", po::bool_switch(&bench.save),
      "measure what plans are predicted by, for the device of --backend and files in --scratch (or "
      "here), and keep it for this model: half a minute")(
      "seconds", po::value(&bench.seconds)->default_value(2)->value_name("S"),
      "of each kernel, for --save");
  OptionGroup all;
  all.add(group)
      .add(synthetic_group(bench.stream.input))
      .add(attention_group(bench.stream.attention))
      .add(resource_group(bench.stream.resources));
  return parse(arguments,
               "usage: stream-cqsa bench [OPTION...]\n"
               "Measures what this machine does: the CPU's attention kernel beside its own matrix "
               "product, its copies and merges; files; and the whole pipeline from pinned host "
               "memory to host memory (stream), on the CPU or, by --backend, a GPU.\n",
               all);
}

json bench_copies(int threads, std::FILE* out) {
  const double copy = copy_rate(threads);
  fmt::print(out, "copy    {:.2f} GB/s, {}\n", copy * 1e-9, counted(threads, "thread"));
  return {{"threads", threads}, {"memcpy_bytes_per_second", copy}};
}

json bench_merges(int threads, std::FILE* out) {
  const double copy = copy_rate(threads);
  json rates = json::array();
  for (const std::int64_t dim : {64, 128}) {
    const double merged = merge_rate(threads, dim);
    // A merge reads both sides and writes one; memcpy reads one and writes one.
    const double share = merged * 1.5 / copy;
    fmt::print(out, "merge   D={:<4} {:.2f} GB/s of partials, {:.0f}% of memcpy's bandwidth\n", dim,
               merged * 1e-9, 100 * share);
    rates.push_back({{"head_dim", dim},
                     {"partial_bytes_per_second", merged},
                     {"share_of_memcpy_bandwidth", share}});
  }
  return {{"threads", threads}, {"memcpy_bytes_per_second", copy}, {"rates", rates}};
}

// Bytes of an fp16 output of 8 heads that are written a second, head by head, not synced.
double output_rate(const std::string& scratch, int threads, bool staged) {
  constexpr std::int64_t heads = 8, dim = 64, piece = 8192;
  const TensorDesc desc{"o",   DType::f16, Layout::bshd, 3, 1, bench_bytes / (heads * dim * 2),
                        heads, dim};
  const std::vector<std::byte> rows(static_cast<std::size_t>(piece * dim * 2), std::byte{1});
  const double seconds = shortest([&] {
    const auto sink = create_tensor(std::filesystem::path(scratch) / "stream-cqsa-bench.npy", "",
                                    desc, true, open_mpi_file, false, staged);
    for (std::int64_t head = 0; head < heads; ++head) {
      on_threads(threads, [&](int i) {
        for (std::int64_t token = i * piece; token < desc.tokens; token += threads * piece) {
          sink->write({0, {token, token + piece}, {head, head + 1}}, rows);
        }
      });
    }
  });
  return static_cast<double>(desc.bytes()) / seconds;
}

json bench_files(const std::string& scratch, int threads, std::FILE* out) {
  const std::filesystem::path path = std::filesystem::path(scratch) / "stream-cqsa-bench.partial";
  const std::vector<std::byte> data(static_cast<std::size_t>(bench_bytes), std::byte{1});
  std::vector<std::byte> back(data.size());
  const auto file = open_mpi_file(path, FileMode::create);
  std::filesystem::remove(path);
  const double write = shortest([&] {
    file->write_at(0, data);
    file->sync();
  });
  const double read = shortest([&] { file->read_at(0, back); });
  const double bytes = static_cast<double>(bench_bytes);
  fmt::print(out, "io      write {:.2f} GB/s synced, read {:.2f} GB/s from the page cache\n",
             bytes / write * 1e-9, bytes / read * 1e-9);
  const double staged = output_rate(scratch, threads, true);
  const double in_place = output_rate(scratch, threads, false);
  fmt::print(out, "io      output by head {:.2f} GB/s, {:.2f} GB/s with a checkpoint, {}\n",
             staged * 1e-9, in_place * 1e-9, counted(threads, "thread"));
  return {{"write_bytes_per_second", bytes / write},
          {"cached_read_bytes_per_second", bytes / read},
          {"threads", threads},
          {"staged_output_bytes_per_second", staged},
          {"in_place_output_bytes_per_second", in_place}};
}

json bench_kernels(const BenchArguments& options, int threads, std::FILE* out) {
  const double matrix = bench_sgemm_flops(threads);
  fmt::print(out, "sgemm   {}, {}\n", format_flops(matrix), counted(threads, "thread"));
  json rates = json::array();
  for (const std::int64_t dim : {64, 128}) {
    for (const Mask mask : {Mask::none, Mask::causal}) {
      Problem problem;
      problem.query_heads = problem.kv_heads = options.heads;
      problem.query_length = problem.key_length = options.length;
      problem.head_dim = dim;
      problem.mask = mask;
      problem.scale = default_scale(dim);
      validate(problem);
      const auto backend = make_cpu_backend({.threads = threads});
      const double rate = KernelBench(*backend, problem).fastest(2.0).flops;
      const char* name = mask == Mask::causal ? "causal" : "full";
      fmt::print(out, "kernel  N={} H={} D={:<4} {:<7} {:>16}, {:.0f}% of sgemm\n", options.length,
                 options.heads, dim, name, format_flops(rate), 100 * rate / matrix);
      rates.push_back({{"length", options.length},
                       {"heads", options.heads},
                       {"head_dim", dim},
                       {"mask", name},
                       {"flop_per_second", rate},
                       {"share_of_sgemm", rate / matrix}});
    }
  }
  return {{"threads", threads}, {"sgemm_flop_per_second", matrix}, {"rates", rates}};
}

bool is_wanted(const BenchArguments& options, std::string_view what) {
  if (!options.only.empty()) {
    return std::ranges::find(options.only, what) != options.only.end();
  }
  if (what == "io") return !options.stream.resources.scratch.empty();
  if (what == "stream") return !options.stream.input.shape.empty();
  return true;
}

// Throws InputError for what is unknown or cannot be measured as asked.
void check(const BenchArguments& options) {
  const ResourceOptions& resources = options.stream.resources;
  check_threads(resources);
  if (options.stream.rounds < 0) throw InputError("--rounds must not be negative");
  for (const std::string& what : options.only) {
    if (what != "kernel" && what != "copy" && what != "merge" && what != "io" && what != "stream") {
      throw InputError(
          fmt::format("--only {}: unknown; use kernel, copy, merge, io or stream", what));
    }
  }
  if (is_wanted(options, "io") && resources.scratch.empty()) {
    throw InputError("--only io needs --scratch DIR");
  }
  for (const char* of_cpu : {"kernel", "copy", "merge"}) {
    if (resources.backend == "auto" || resources.backend == "cpu") break;
    if (!is_wanted(options, of_cpu)) continue;
    throw InputError(
        fmt::format("--backend {}: {} is measured on the CPU alone; use --only stream with --shape",
                    resources.backend, of_cpu));
  }
}

int save(const BenchArguments& options) {
  if (!options.only.empty()) throw InputError("--save measures what it needs; leave out --only");
  if (!(options.seconds > 0 && options.seconds <= 60)) {
    throw InputError(fmt::format("--seconds {}: use more than 0, to 60", options.seconds));
  }
  const Costs costs =
      measure_costs(options.stream.resources, options.seconds, options.json ? stderr : stdout);
  const auto path = save_costs(costs);
  if (options.json) {
    print_out(to_json_text(costs));
  } else {
    fmt::print("kept in   {}\n", path.string());
  }
  return 0;
}

}  // namespace

int bench_command(const Arguments& arguments, const MpiEnvironment&) {
  BenchArguments options;
  if (!parse_bench(arguments, options)) return 0;
  if (options.save) return save(options);
  check(options);
  const ResourceOptions& resources = options.stream.resources;
  const int threads = resources.threads > 0 ? resources.threads : this_machine().cores;
  const auto wanted = [&](std::string_view what) { return is_wanted(options, what); };
  std::FILE* out = options.json ? stderr : stdout;
  json rates = {{"versions", versions_json()}};
  if (wanted("copy")) rates["copy"] = bench_copies(threads, out);
  if (wanted("merge")) rates["merge"] = bench_merges(threads, out);
  if (wanted("io")) rates["io"] = bench_files(resources.scratch, std::min(threads, 4), out);
  if (wanted("kernel")) rates["kernel"] = bench_kernels(options, threads, out);
  if (wanted("stream")) rates["stream"] = bench_stream(options.stream, out);
  if (options.json) fmt::print("{}\n", rates.dump(1));
  return 0;
}

}  // namespace stream_cqsa
