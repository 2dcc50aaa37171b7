#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <filesystem>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "app/commands.hpp"
#include "app/machine.hpp"
#include "app/problem.hpp"
#include "mpi/file.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/files.hpp"

namespace stream_cqsa {
namespace {

// Tokens are written in pieces of about this size.
constexpr std::int64_t piece_bytes = std::int64_t{16} << 20;
constexpr int most_threads = 16;

struct GenerateArguments {
  InputOptions input;
  std::string output;
  std::uint64_t seed = 0;
  bool overwrite = false;
};

bool parse_generate(const Arguments& arguments, GenerateArguments& generate) {
  namespace po = boost::program_options;
  InputOptions& input = generate.input;
  OptionGroup group("Options");
  group.add_options()("output,o", po::value(&generate.output)->value_name("FILE"),
                      "a .safetensors file for Q, K and V (tensors \"q\", \"k\" and \"v\")")(
      "query", po::value(&input.query)->value_name("FILE"),
      "Q, .npy or .safetensors; with --key and --value instead of --output")(
      "key", po::value(&input.key)->value_name("FILE"), "K")(
      "value", po::value(&input.value)->value_name("FILE"), "V")(
      "layout", po::value(&input.layout)->default_value("bshd")->value_name("LAYOUT"),
      "bshd or bhsd")("seed", po::value(&generate.seed)->default_value(1)->value_name("SEED"),
                      "the same numbers as --input synthetic:SEED")(
      "overwrite", po::bool_switch(&generate.overwrite), "replace files that exist");
  OptionGroup all;
  all.add(synthetic_group(input)).add(group);
  return parse(arguments,
               "usage: stream-cqsa generate --shape B,N,H,D --output FILE [OPTION...]\n"
               "       stream-cqsa generate --shape B,N,H,D --query FILE --key FILE --value FILE "
               "[OPTION...]\n"
               "Writes approximately normal random Q, K and V, to one file or three.\n",
               all);
}

void check_files(const GenerateArguments& options, DType dtype) {
  const std::string& query = options.input.query;
  const std::string& key = options.input.key;
  const std::string& value = options.input.value;
  if (!options.output.empty() && !(query.empty() && key.empty() && value.empty())) {
    throw InputError("--output excludes --query, --key and --value");
  }
  if (options.output.empty() && (query.empty() || key.empty() || value.empty())) {
    throw InputError("no file to write; give --output, or --query, --key and --value");
  }
  const auto is_npy = [](const std::string& path) {
    return std::filesystem::path(path).extension() == ".npy";
  };
  if (is_npy(options.output)) {
    throw InputError(fmt::format(
        "--output {}: a .npy file holds one tensor; name a .safetensors file, or give --query, "
        "--key and --value",
        options.output));
  }
  for (const std::string& path : {query, key, value}) {
    if (dtype != DType::bf16 || !is_npy(path)) continue;
    throw InputError(fmt::format(
        "{}: .npy files have no bfloat16; name a .safetensors file, or use --dtype f16 or f32",
        path));
  }
  check_output_paths({}, {}, {options.output, query, key, value}, options.overwrite);
}

// Sinks for Q, K and V, in this order.
std::vector<std::unique_ptr<TensorSink>> create_sinks(const OpenProblem& open,
                                                      const GenerateArguments& options,
                                                      Layout layout) {
  const InputOptions& input = options.input;
  const std::array paths = {input.query, input.key, input.value};
  const std::array names = {"q", "k", "v"};
  std::vector<TensorDesc> descs = {open.query->desc(), open.key->desc(), open.value->desc()};
  for (std::size_t i = 0; i < descs.size(); ++i) {
    descs[i].name = names[i];
    descs[i].layout = layout;
  }
  if (!options.output.empty()) {
    return create_tensors(options.output, descs, options.overwrite, open_mpi_file);
  }
  std::vector<std::unique_ptr<TensorSink>> sinks;
  for (std::size_t i = 0; i < descs.size(); ++i) {
    sinks.push_back(create_tensor(paths[i], names[i], descs[i], options.overwrite, open_mpi_file));
  }
  return sinks;
}

// `source` is bshd, the order in which sinks take blocks.
void copy_tensor(TensorSource& source, TensorSink& sink) {
  const TensorDesc& desc = sink.desc();
  const std::int64_t vector_bytes = desc.dim * size_of(desc.dtype);
  const std::int64_t step = std::max<std::int64_t>(1, piece_bytes / (desc.heads * vector_bytes));
  const std::int64_t pieces = ceil_div(desc.tokens, step);
  std::atomic<std::int64_t> next{0};
  const auto copy = [&] {
    std::vector<std::byte> rows;
    for (std::int64_t piece; (piece = next++) < desc.batch * pieces;) {
      const std::int64_t token = piece % pieces * step;
      const Block block{
          piece / pieces, {token, std::min(token + step, desc.tokens)}, {0, desc.heads}};
      rows.resize(static_cast<std::size_t>(block.vectors() * vector_bytes));
      source.read(block, rows);
      sink.write(block, rows);
    }
  };
  std::vector<std::future<void>> threads;
  for (int i = 0; i < std::clamp(this_machine().cores, 1, most_threads); ++i)
    threads.push_back(std::async(std::launch::async, copy));
  for (auto& thread : threads) thread.get();
}

}  // namespace

int generate_command(const Arguments& arguments, const MpiEnvironment&) {
  GenerateArguments options;
  if (!parse_generate(arguments, options)) return 0;
  const Layout layout = layout_option(options.input.layout);
  options.input.layout = "bshd";
  const OpenProblem open = open_synthetic(options.input, options.seed);
  check_files(options, open.problem.dtype);
  const auto sinks = create_sinks(open, options, layout);
  copy_tensor(*open.query, *sinks[0]);
  copy_tensor(*open.key, *sinks[1]);
  copy_tensor(*open.value, *sinks[2]);
  for (const auto& sink : sinks) sink->commit();
  return 0;
}

}  // namespace stream_cqsa
