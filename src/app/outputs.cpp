#include "app/outputs.hpp"

#include <fmt/format.h>

#include "mpi/file.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/files.hpp"

namespace stream_cqsa {
namespace {

// Their names in .safetensors files.
constexpr const char* output_name = "o";
constexpr const char* lse_name = "lse";

TensorDesc lse_desc(const Problem& problem) {
  return stream_cqsa::lse_desc(problem.batch, problem.query_heads, problem.query_length);
}

}  // namespace

Sinks create_sinks(const OpenProblem& open, const OutputOptions& options, bool keep) {
  Sinks sinks;
  sinks.output = create_tensor(options.output, output_name, output_desc(open), options.overwrite,
                               open_mpi_file, keep);
  if (!options.lse.empty()) {
    sinks.lse = create_tensor(options.lse, lse_name, lse_desc(open.problem), options.overwrite,
                              open_mpi_file, keep);
  }
  return sinks;
}

Sinks join_sinks(const Plan& plan, const OutputOptions& options) {
  const Problem& problem = plan.problem();
  const TensorDesc output{
      "o",           problem.output_dtype, plan.request.output_layout, 4,
      problem.batch, problem.query_length, problem.query_heads,        problem.head_dim};
  try {
    Sinks sinks;
    sinks.output = join_tensor(options.output, output_name, output, open_mpi_file);
    if (plan.request.lse) {
      sinks.lse = join_tensor(options.lse, lse_name, lse_desc(problem), open_mpi_file);
    }
    return sinks;
  } catch (const InputError& error) {
    throw InputError(fmt::format(
        "{}; mergers write to the outputs themselves, in a directory that they share with rank 0",
        error.what()));
  }
}

}  // namespace stream_cqsa
