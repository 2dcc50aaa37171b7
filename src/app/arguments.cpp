#include "app/arguments.hpp"

#include <fmt/format.h>

#include <sstream>

#include "mpi/environment.hpp"
#include "mpi/fault.hpp"
#include "stream_cqsa/error.hpp"
#include "version.hpp"

namespace stream_cqsa {

namespace po = boost::program_options;

namespace {

// An option that has no default: 0 is a value like any other.
po::typed_value<std::int64_t>* optional_value(std::optional<std::int64_t>& option) {
  return po::value<std::int64_t>()->notifier([&option](std::int64_t value) { option = value; });
}

}  // namespace

OptionGroup input_group(InputOptions& options) {
  OptionGroup group("Input");
  group.add_options()("input", po::value(&options.input)->value_name("FILE"),
                      "a .safetensors file with Q, K and V, or synthetic:SEED")(
      "query", po::value(&options.query)->value_name("FILE"),
      "Q, a .npy or .safetensors file; with --key and --value instead of --input")(
      "key", po::value(&options.key)->value_name("FILE"), "K")(
      "value", po::value(&options.value)->value_name("FILE"), "V")(
      "query-name", po::value(&options.query_name)->default_value("q|query")->value_name("NAME"),
      "Q's name in a .safetensors file, or names to try")(
      "key-name", po::value(&options.key_name)->default_value("k|key")->value_name("NAME"),
      "K's name")("value-name",
                  po::value(&options.value_name)->default_value("v|value")->value_name("NAME"),
                  "V's name")(
      "layout", po::value(&options.layout)->default_value("bshd")->value_name("LAYOUT"),
      "bshd: [B, N, H, D] or [N, H, D]; bhsd: [B, H, N, D] or [H, N, D]; O has the same")(
      "direct-io", po::value(&options.direct_io)->default_value("auto")->value_name("WHEN"),
      "input files, and accumulators that run has in a file, past the page cache: yes, no, or "
      "auto: each where it is larger than half of the available memory, or than --host-memory "
      "leaves of it");
  return group;
}

OptionGroup synthetic_group(InputOptions& options) {
  OptionGroup group("Synthetic input");
  group.add_options()("shape", po::value(&options.shape)->value_name("B,N,H,D"), "of Q")(
      "kv-heads", po::value(&options.kv_heads)->value_name("H"),
      "key/value heads (default: as many as query heads)")(
      "key-length", po::value(&options.key_length)->value_name("N"),
      "tokens of K and V (default: as many as of Q)")(
      "dtype", po::value(&options.dtype)->value_name("TYPE"), "f16 (default), bf16 or f32");
  return group;
}

OptionGroup attention_group(AttentionOptions& options) {
  OptionGroup group("Attention");
  group.add_options()("causal", po::bool_switch(&options.causal),
                      "query i sees key j where j <= i + (key length - query length)")(
      "scale", po::value<double>()->value_name("S")->notifier([&options](double scale) {
        options.scale = scale;
      }),
      "of the scores (default: 1/sqrt(D))")("output-dtype",
                                            po::value(&options.output_dtype)->value_name("TYPE"),
                                            "of O: f16, bf16, f32 or f64 (default: Q's)")(
      "queries",
      po::value<std::string>()->value_name("BEGIN:END")->notifier([&options](const auto& rows) {
        options.queries = rows;
      }),
      "rows of Q's sequence to compute, from 0, END not among them: O has END - BEGIN rows, those "
      "of "
      "a run of all to rounding, as the division is another (default: all)");
  return group;
}

OptionGroup resource_group(ResourceOptions& options) {
  OptionGroup group("Resources");
  group.add_options()("backend",
                      po::value(&options.backend)->default_value("auto")->value_name("NAME"),
                      "auto, cpu or cuda; auto: cuda where there is a device")(
      "device-memory", po::value(&options.device_memory)->value_name("BYTES"),
      "budget of the memory that is computed in, such as 512MiB or 2GiB (default: 90% of the "
      "device's free memory; on the CPU a quarter of the available memory)")(
      "host-memory", po::value(&options.host_memory)->value_name("BYTES"),
      "budget of the memory for staging and accumulators (default: half of the available memory)")(
      "scratch", po::value(&options.scratch)->value_name("DIR"),
      "where accumulators go that do not fit in host memory")(
      "division", po::value(&options.division)->value_name("NAME"),
      "cqs: by cyclic quorum sets; tiles: into rectangles of queries and keys, row by row; auto: "
      "tiles where they are predicted to be faster (default: cqs; tiles where queries are an "
      "eighth of the keys or fewer and cqs is no faster)")(
      "chunks", optional_value(options.chunks)->value_name("C"),
      "with cqs: chunks per sequence, 1 to 20000 (default: chosen)")(
      "grid", po::value(&options.grid)->value_name("ROWSxCOLUMNS"),
      "with tiles: chunks of the queries and of the keys, 1 to 20000 each (default: chosen)")(
      "heads-per-group", optional_value(options.heads_per_group)->value_name("H"),
      "key/value heads computed together, 1 to all of them (default: chosen)")(
      "threads", po::value(&options.threads)->default_value(0)->value_name("T"),
      "of the CPU backend, 0: one per core")(
      "plan", po::value(&options.plan)->value_name("FILE"),
      "use this plan, written by plan --json, instead of making one");
  return group;
}

OptionGroup ranks_group(JobOptions& options) {
  OptionGroup group("Several ranks");
  group.add_options()(
      "mergers", po::value(&options.resources.mergers)->default_value(0)->value_name("M"),
      "ranks 1 to M share the merging, the accumulators and the writing with rank 0, each for some "
      "of the query chunks, where one rank is too slow at it or has too little memory; the ranks "
      "behind them compute. They write to the outputs, and keep their part of the checkpoint, in "
      "directories that all of them share")(
      "input-through-master", po::bool_switch(&options.input_through_master),
      "rank 0 alone opens the inputs and sends the others what they need, for hosts "
      "that share no file system");
  return group;
}

OptionGroup output_group(OutputOptions& options) {
  OptionGroup group("Output");
  group.add_options()("output,o", po::value(&options.output)->value_name("FILE"),
                      "O, .npy or .safetensors (tensor \"o\"), in Q's shape and layout")(
      "lse", po::value(&options.lse)->value_name("FILE"),
      "log-sum-exp of the scaled scores, natural logarithm, fp32 [B, H, N] (tensor \"lse\")")(
      "overwrite", po::bool_switch(&options.overwrite), "replace outputs that exist");
  return group;
}

OptionGroup checkpoint_group(std::string& directory, CheckpointTimes& times) {
  OptionGroup group("Checkpoint");
  group.add_options()(
      "checkpoint", po::value(&directory)->value_name("DIR"),
      "keep what is merged in this directory, made where it is not there: the same command then "
      "continues a run that was stopped or killed. SIGUSR1 makes a checkpoint; SIGTERM, SIGINT, "
      "SIGHUP and SIGXCPU make one and end the run with the exit status 75. What is in DIR is "
      "removed when the run is done")("checkpoint-interval",
                                      po::value<double>()->value_name("SECONDS")->notifier(
                                          [&times](double seconds) { times.interval = seconds; }),
                                      "from one checkpoint to the next (default: 60)")(
      "max-hours", po::value<double>()->value_name("H")->notifier([&times](double hours) {
        times.max_hours = hours;
      }),
      "stop as by SIGTERM when 99% of this time has passed since the start");
  return group;
}

OptionGroup job_group(JobOptions& options) {
  OptionGroup all;
  all.add(input_group(options.input))
      .add(synthetic_group(options.input))
      .add(attention_group(options.attention))
      .add(resource_group(options.resources))
      .add(ranks_group(options))
      .add(output_group(options.output))
      .add(checkpoint_group(options.resources.checkpoint, options.checkpoint));
  return all;
}

bool parse(const Arguments& arguments, const std::string& intro, OptionGroup options) {
  options.add_options()("help,h", "show this text");
  try {
    po::variables_map values;
    // No abbreviations: a typing error must not become another option.
    const int style = po::command_line_style::unix_style & ~po::command_line_style::allow_guessing;
    const auto parsed = po::command_line_parser(arguments).options(options).style(style).run();
    for (const auto& option : parsed.options) {
      if (option.position_key < 0) continue;
      throw InputError(fmt::format("'{}' is not an option; --help lists the options",
                                   option.original_tokens.front()));
    }
    po::store(parsed, values);
    if (values.count("help")) {
      std::ostringstream text;
      text << options;
      fmt::print("{}\n{}", intro, text.str());
      return false;
    }
    po::notify(values);
    return true;
  } catch (const po::validation_error& error) {
    // Options that take no number take any text.
    throw InputError(fmt::format("{}: it takes a number; --help lists the options", error.what()));
  } catch (const po::error& error) {
    throw InputError(fmt::format("{}; --help lists the options", error.what()));
  }
}

int print_version() {
  fmt::print(
      "stream-cqsa {}\ncommit    {}\nbuild     {}\nbackends  {}\nmpi       {}\n          {}\n",
      version_number, version_commit, version_build, version_backends,
      MpiEnvironment::library_version(),
      survives_lost_ranks() ? "a run survives a lost worker under mpirun --with-ft ulfm"
                            : "a lost worker ends a run: no user-level fault mitigation");
  return 0;
}

}  // namespace stream_cqsa
