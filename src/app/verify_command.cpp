#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <optional>
#include <tuple>

#include "app/audit.hpp"
#include "app/commands.hpp"
#include "app/problem.hpp"
#include "app/progress.hpp"
#include "app/verification.hpp"
#include "core/counted.hpp"
#include "mpi/file.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

struct VerifyArguments {
  InputOptions input;
  AttentionOptions attention;
  std::string output, lse;
  std::int64_t rows = 32;
  std::uint64_t seed = 2;
  bool json = false;
  bool quiet = false;
};

bool parse_verify(const Arguments& arguments, VerifyArguments& verify) {
  namespace po = boost::program_options;
  OptionGroup group("Verification");
  group.add_options()("output,o", po::value(&verify.output)->value_name("FILE"),
                      "O, as run wrote it")("lse", po::value(&verify.lse)->value_name("FILE"),
                                            "its log-sum-exp, checked at the same rows")(
      "rows", po::value(&verify.rows)->default_value(32)->value_name("R"),
      "rows to recompute: each takes key length x head dimension steps in fp64, and their number "
      "is limited accordingly")(
      "seed", po::value(&verify.seed)->default_value(2)->value_name("SEED"), "chooses the rows")(
      "json", po::bool_switch(&verify.json), "print the comparison as JSON")(
      "quiet", po::bool_switch(&verify.quiet), "no progress");
  OptionGroup all;
  all.add(input_group(verify.input))
      .add(synthetic_group(verify.input))
      .add(attention_group(verify.attention))
      .add(group);
  return parse(
      arguments,
      "usage: stream-cqsa verify --input FILE --output FILE [OPTION...]\n"
      "Recomputes sampled rows in fp64 and fails, with exit status 1, where O or its lse "
      "is further\noff than fp32 arithmetic, O's dtype and, with 16-bit inputs, weights rounded to "
      "that type\n(as on tensor cores) allow, or where no row can be compared.\n",
      all);
}

void check_output(const TensorDesc& output, const TensorDesc& expected, const Problem& problem) {
  if (output.batch == expected.batch && output.tokens == expected.tokens &&
      output.heads == expected.heads && output.dim == expected.dim) {
    return;
  }
  const bool part = output.tokens < problem.sequence_length();
  throw InputError(fmt::format("{} is [{}, {}, {}, {}] and the query is [{}, {}, {}, {}]{}",
                               output.name, output.batch, output.tokens, output.heads, output.dim,
                               expected.batch, expected.tokens, expected.heads, expected.dim,
                               part ? "; --queries BEGIN:END names the rows that it has" : ""));
}

// [dim]
std::vector<double> read_row(TensorSource& output, const RowIndex& row) {
  const DType dtype = storage_type(output.desc().dtype);
  const Range heads = output.desc().readable_heads({row.head, row.head + 1});
  const Block block{row.batch, {row.token, row.token + 1}, heads};
  const std::int64_t vector_bytes = output.desc().dim * size_of(dtype);
  std::vector<std::byte> data(static_cast<std::size_t>(block.vectors() * vector_bytes));
  output.read(block, data);
  return to_double(dtype, std::span(data).subspan(
                              static_cast<std::size_t>((row.head - heads.begin) * vector_bytes),
                              static_cast<std::size_t>(vector_bytes)));
}

// [B, H, N] on disk; as an input of layout bhsd that is [heads, tokens, dim].
std::unique_ptr<TensorSource> open_lse(const std::string& path, const Problem& problem) {
  auto lse = open_tensor(path, "lse", Layout::bhsd, open_mpi_file);
  const TensorDesc& desc = lse->desc();
  if (desc.rank == 3 && desc.heads == problem.batch && desc.tokens == problem.query_heads &&
      desc.dim == problem.query_length) {
    return lse;
  }
  throw InputError(fmt::format("{} is not an lse of the query, [{}, {}, {}]", desc.name,
                               problem.batch, problem.query_heads, problem.query_length));
}

// Throws InputError for more rows than can be recomputed; more than there are is no harm.
void check_rows(const Problem& problem, std::int64_t rows) {
  const std::int64_t most = most_rows(problem);
  const std::int64_t wanted =
      std::min(rows, problem.batch * problem.query_length * problem.query_heads);
  if (rows >= 1 && wanted <= most) return;
  throw InputError(
      fmt::format("--rows {}: a row takes {} x {} steps in fp64, and memory; use 1 to {}", rows,
                  problem.key_length, problem.head_dim, most));
}

// verify_rows with its progress.
Verification verify_visibly(const VerifyArguments& options, OpenProblem& open,
                            const std::vector<RowIndex>& rows, const RowValues& row_of,
                            const RowValues& lse_of) {
  const std::int64_t total = visible_keys(open.problem, rows);
  std::atomic<std::int64_t> seen = 0;
  std::optional<Progress> progress;
  if (!options.quiet) {
    progress.emplace([&](double) -> Progressed {
      const double share = total > 0 ? static_cast<double>(seen) / static_cast<double>(total) : 1.0;
      return {share, 0, counted(static_cast<std::int64_t>(rows.size()), "row") + " against fp64"};
    });
  }
  return verify_rows(open, rows, row_of, lse_of, [&seen](std::int64_t keys) { seen += keys; });
}

using Place = std::tuple<std::int64_t, std::int64_t, std::int64_t>;  // batch, head, token

// The lse of `rows`. Each head that has some is read once, whole: 4 bytes a token.
std::map<Place, double> read_lse(TensorSource& lse, const std::vector<RowIndex>& rows) {
  std::map<Place, double> values;
  for (const RowIndex& row : rows) values[{row.batch, row.head, row.token}];
  const DType dtype = storage_type(lse.desc().dtype);
  const auto element = static_cast<std::size_t>(size_of(dtype));
  std::vector<std::byte> data(static_cast<std::size_t>(lse.desc().dim) * element);
  Block held;
  for (auto& [place, value] : values) {
    const auto [batch, head, token] = place;
    const Block wanted{0, {head, head + 1}, {batch, batch + 1}};
    if (!(wanted == held)) lse.read(wanted, data);
    held = wanted;
    value = to_double(dtype,
                      std::span(data).subspan(static_cast<std::size_t>(token) * element, element))
                .front();
  }
  return values;
}

}  // namespace

int verify_command(const Arguments& arguments, const MpiEnvironment&) {
  VerifyArguments options;
  if (!parse_verify(arguments, options)) return 0;
  if (options.output.empty()) throw InputError("no output to verify; give --output FILE");
  OpenProblem open = open_problem(options.input, options.attention);
  const auto output =
      open_tensor(options.output, "o|output", open.query->desc().layout, open_mpi_file);
  check_output(output->desc(), open.query->desc(), open.problem);
  open.problem.output_dtype = output->desc().dtype;
  check_rows(open.problem, options.rows);

  const auto rows = sample_rows(open.problem, options.rows, options.seed);
  std::map<Place, double> lse;
  if (!options.lse.empty()) lse = read_lse(*open_lse(options.lse, open.problem), rows);
  const auto lse_of = [&](const RowIndex& row) {
    return std::vector{lse.at({row.batch, row.head, row.token})};
  };
  const Verification verification = verify_visibly(
      options, open, rows, [&](const RowIndex& row) { return read_row(*output, row); },
      options.lse.empty() ? RowValues() : lse_of);
  if (options.json) {
    fmt::print("{}\n", to_json(verification).dump(1));
  } else {
    const bool all = std::ssize(rows) < options.rows;
    fmt::print("{}{}\n", describe(verification), all ? "; these are all rows" : "");
  }
  return verification.ok() && verification.compared() > 0 ? 0 : 1;
}

}  // namespace stream_cqsa
