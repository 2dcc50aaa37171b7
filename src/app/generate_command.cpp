#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "app/commands.hpp"
#include "app/problem.hpp"
#include "mpi/file.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/files.hpp"

namespace stream_cqsa {
namespace {

// Tokens are written in pieces of about this size.
constexpr std::int64_t piece_bytes = std::int64_t{16} << 20;

struct GenerateArguments {
  InputOptions input;
  std::uint64_t seed = 0;
  bool overwrite = false;
};

bool parse_generate(const Arguments& arguments, GenerateArguments& generate) {
  namespace po = boost::program_options;
  InputOptions& input = generate.input;
  OptionGroup group("Options");
  group.add_options()("query", po::value(&input.query)->value_name("FILE"),
                      "Q, .npy or .safetensors")("key", po::value(&input.key)->value_name("FILE"),
                                                 "K")(
      "value", po::value(&input.value)->value_name("FILE"), "V")(
      "layout", po::value(&input.layout)->default_value("bshd")->value_name("LAYOUT"),
      "bshd or bhsd")("seed", po::value(&generate.seed)->default_value(1)->value_name("SEED"),
                      "the same numbers as --input synthetic:SEED")(
      "overwrite", po::bool_switch(&generate.overwrite), "replace files that exist");
  OptionGroup all;
  all.add(synthetic_group(input)).add(group);
  return parse(arguments,
               "usage: stream-cqsa generate --shape B,N,H,D --query FILE --key FILE --value FILE\n"
               "Writes approximately normal random Q, K and V.\n",
               all);
}

// `source` is bshd, the order in which sinks take blocks.
void write_tensor(TensorSource& source, const std::string& path, const char* name, Layout layout,
                  bool overwrite) {
  TensorDesc desc = source.desc();
  desc.layout = layout;
  const auto sink = create_tensor(path, name, desc, overwrite, open_mpi_file);
  const std::int64_t vector_bytes = desc.dim * size_of(desc.dtype);
  const std::int64_t step = std::max<std::int64_t>(1, piece_bytes / (desc.heads * vector_bytes));
  std::vector<std::byte> rows;
  for (std::int64_t batch = 0; batch < desc.batch; ++batch) {
    for (std::int64_t token = 0; token < desc.tokens; token += step) {
      const Block block{batch, {token, std::min(token + step, desc.tokens)}, {0, desc.heads}};
      rows.resize(static_cast<std::size_t>(block.vectors() * vector_bytes));
      source.read(block, rows);
      sink->write(block, rows);
    }
  }
  sink->commit();
}

}  // namespace

int generate_command(const Arguments& arguments, const MpiEnvironment&) {
  GenerateArguments options;
  if (!parse_generate(arguments, options)) return 0;
  InputOptions input = options.input;
  if (input.query.empty() || input.key.empty() || input.value.empty()) {
    throw InputError("give --query, --key and --value, the files to write");
  }
  check_output_paths({}, {}, {input.query, input.key, input.value}, options.overwrite);
  const Layout layout = layout_option(input.layout);
  input.layout = "bshd";
  const OpenProblem open = open_synthetic(input, options.seed);
  write_tensor(*open.query, input.query, "q", layout, options.overwrite);
  write_tensor(*open.key, input.key, "k", layout, options.overwrite);
  write_tensor(*open.value, input.value, "v", layout, options.overwrite);
  return 0;
}

}  // namespace stream_cqsa
