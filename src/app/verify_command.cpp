#include <fmt/format.h>

#include "app/audit.hpp"
#include "app/commands.hpp"
#include "app/problem.hpp"
#include "app/verification.hpp"
#include "mpi/file.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

struct VerifyArguments {
  InputOptions input;
  AttentionOptions attention;
  std::string output;
  std::int64_t rows = 32;
  std::uint64_t seed = 2;
  bool json = false;
};

bool parse_verify(const Arguments& arguments, VerifyArguments& verify) {
  namespace po = boost::program_options;
  OptionGroup group("Verification");
  group.add_options()("output,o", po::value(&verify.output)->value_name("FILE"),
                      "O, as run wrote it")(
      "rows", po::value(&verify.rows)->default_value(32)->value_name("R"), "rows to recompute")(
      "seed", po::value(&verify.seed)->default_value(2)->value_name("SEED"), "chooses the rows")(
      "json", po::bool_switch(&verify.json), "print the comparison as JSON");
  OptionGroup all;
  all.add(input_group(verify.input))
      .add(synthetic_group(verify.input))
      .add(attention_group(verify.attention))
      .add(group);
  return parse(arguments,
               "usage: stream-cqsa verify --input FILE --output FILE [OPTION...]\n"
               "Recomputes sampled rows in fp64 and fails, with exit status 1, where the output "
               "is further off than its dtype allows.\n",
               all);
}

void check_output(const TensorDesc& output, const TensorDesc& expected) {
  if (output.batch == expected.batch && output.tokens == expected.tokens &&
      output.heads == expected.heads && output.dim == expected.dim) {
    return;
  }
  throw InputError(fmt::format("{} is [{}, {}, {}, {}] and the query is [{}, {}, {}, {}]",
                               output.name, output.batch, output.tokens, output.heads, output.dim,
                               expected.batch, expected.tokens, expected.heads, expected.dim));
}

}  // namespace

int verify_command(const Arguments& arguments, const MpiEnvironment&) {
  VerifyArguments options;
  if (!parse_verify(arguments, options)) return 0;
  if (options.output.empty()) throw InputError("no output to verify; give --output FILE");
  if (options.rows < 1) throw InputError("--rows must be positive");
  OpenProblem open = open_problem(options.input, options.attention);
  const auto output =
      open_tensor(options.output, "o|output", open.query->desc().layout, open_mpi_file);
  check_output(output->desc(), open.query->desc());
  open.problem.output_dtype = output->desc().dtype;

  const auto rows = sample_rows(open.problem, options.rows, options.seed);
  const DType dtype = storage_type(output->desc().dtype);
  const auto row_of = [&](const RowIndex& row) {
    const Block block{row.batch, {row.token, row.token + 1}, {row.head, row.head + 1}};
    const Block readable{row.batch, block.tokens, output->desc().readable_heads(block.heads)};
    const std::int64_t vector_bytes = open.problem.head_dim * size_of(dtype);
    std::vector<std::byte> data(static_cast<std::size_t>(readable.vectors() * vector_bytes));
    output->read(readable, data);
    const auto offset = static_cast<std::size_t>((row.head - readable.heads.begin) * vector_bytes);
    return to_double(dtype,
                     std::span(data).subspan(offset, static_cast<std::size_t>(vector_bytes)));
  };
  const Verification verification = verify_rows(open, rows, row_of);
  if (options.json) {
    fmt::print("{}\n", to_json(verification).dump(1));
  } else {
    fmt::print("{}\n", describe(verification));
  }
  return verification.ok() ? 0 : 1;
}

}  // namespace stream_cqsa
