// A fault of the device ends a run with a checkpoint; another process goes on from there and comes
// to the same bytes. The process with the fault is this program again: CUDA is spoilt for it.
#define BOOST_TEST_MODULE cuda_fault_checkpoint
#include <cuda_runtime_api.h>

#include <boost/test/unit_test.hpp>
#include <cstdlib>
#include <random>
#include <string>

#include "spoiling_backend.hpp"
#include "stream_cqsa/error.hpp"
#include "support/durable_run.hpp"
#include "support/needs_device.hpp"
#include "support/run_plan.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_GLOBAL_FIXTURE(NeedsDevice);

namespace {

// Names the directory of the checkpoint to the process that is to fail.
constexpr const char* directory_variable = "STREAM_CQSA_TEST_FAULT_DIRECTORY";

Problem small_problem() {
  Problem problem;
  problem.query_heads = problem.kv_heads = 2;
  problem.query_length = problem.key_length = 3000;
  problem.head_dim = 64;
  problem.dtype = DType::f16;
  problem.output_dtype = DType::f16;
  problem.mask = Mask::causal;
  problem.scale = default_scale(problem.head_dim);
  return problem;
}

Plan small_plan() {
  PlanRequest request = roomy_request(small_problem(), Layout::bshd, *make_cuda_backend({}));
  request.chunks = 7;
  request.heads_per_group = 1;
  request.host_accumulators = true;
  return make_plan(request);
}

TestInput small_input() {
  std::mt19937_64 random(5);
  return random_input(small_problem(), Layout::bshd, 1, random);
}

RunOptions options_in(const std::filesystem::path& directory, StopRequest* stop = nullptr) {
  RunOptions options;
  options.checkpoint.directory = directory;
  options.checkpoint.identity = 7;
  options.checkpoint.stop = stop;
  return options;
}

// A checkpoint at a third of the launches; then a run that continues and faults.
void run_until_fault(const std::filesystem::path& directory) {
  const Plan plan = small_plan();
  const TestInput input = small_input();
  DurableRuns runs(plan, input);
  StopRequest stop;
  HoldingBackend holding(make_cuda_backend({}), stop, plan.subproblem_count() / 3);
  BOOST_CHECK_THROW(runs.run(holding, options_in(directory, &stop)), Stopped);
  SpoilingBackend spoiling(Call::launch, 2);
  BOOST_CHECK_THROW(runs.run(spoiling, options_in(directory)), Error);
  BOOST_TEST(spoiling.spoilt());
  BOOST_TEST(cudaDeviceSynchronize() != cudaSuccess);
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_fault_leaves_a_checkpoint_that_another_process_continues) {
  if (const char* directory = std::getenv(directory_variable)) return run_until_fault(directory);
  const TestDirectory directory;
  const std::string program = boost::unit_test::framework::master_test_suite().argv[0];
  const std::string command =
      std::string(directory_variable) + "='" + directory.path().string() + "' '" + program + "'";
  BOOST_TEST_REQUIRE(std::system(command.c_str()) == 0);

  const Plan plan = small_plan();
  const TestInput input = small_input();
  DurableRuns undisturbed(plan, input), runs(plan, input);
  RunOptions plain;
  plain.scratch = std::filesystem::temp_directory_path();
  const auto backend = make_cuda_backend({}), another = make_cuda_backend({});
  const RunResult whole = undisturbed.run(*backend, plain);
  const RunResult rest = runs.run(*another, options_in(directory.path()));
  BOOST_TEST(rest.checkpoint.resumed.scores > 0u);
  BOOST_TEST(rest.scores_computed < whole.scores_computed);
  BOOST_TEST((runs.output == undisturbed.output));
  BOOST_TEST((runs.lse == undisturbed.lse));
}
