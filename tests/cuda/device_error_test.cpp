// Errors on the device end a run with one line that names the subproblem and the call. A fault in a
// kernel spoils CUDA for the whole process: CTest runs every case in one of its own.
#define BOOST_TEST_MODULE cuda_device_error
#include <boost/test/unit_test.hpp>
#include <random>
#include <string>

#include "needs_device.hpp"
#include "stream_cqsa/cuda_backend.hpp"
#include "stream_cqsa/error.hpp"
#include "support/delayed_backend.hpp"
#include "support/run_plan.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_GLOBAL_FIXTURE(NeedsDevice);

namespace {

constexpr std::int32_t far_slot = 1 << 28;  // far beyond the arena, where nothing is mapped

/// Sends the fourth submission of a lane to memory that is not there.
class SpoilingBackend final : public DelayedBackend {
 public:
  explicit SpoilingBackend(Lane lane) : DelayedBackend(make_cuda_backend({}), 1), lane_(lane) {}

  Ticket copy_in(const CopyIn& copy, std::span<const Ticket> after) override {
    CopyIn spoilt = copy;
    if (hit(Lane::copy_in)) spoilt.slot = far_slot;
    return DelayedBackend::copy_in(spoilt, after);
  }
  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    if (hit(Lane::compute)) work.keys.front().slot = far_slot;
    return DelayedBackend::launch(std::move(work), after);
  }
  Ticket copy_out(const CopyOut& copy, std::span<const Ticket> after) override {
    CopyOut spoilt = copy;
    if (hit(Lane::copy_out)) spoilt.state_slot = far_slot;
    return DelayedBackend::copy_out(spoilt, after);
  }

 private:
  bool hit(Lane lane) { return lane == lane_ && ++submissions_ == 4; }
  Lane lane_;
  std::atomic<int> submissions_{0};
};

std::string failure_of(Lane lane) {
  Problem problem;
  problem.query_length = problem.key_length = 3000;
  problem.head_dim = 64;
  problem.dtype = DType::f16;
  problem.scale = default_scale(problem.head_dim);
  SpoilingBackend backend(lane);
  PlanRequest request = roomy_request(problem, Layout::bshd, backend);
  request.chunks = 7;
  std::mt19937_64 random(1);
  const TestInput input = random_input(problem, Layout::bshd, 1.0, random);
  try {
    run_plan(make_plan(request), input, backend, false);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

void check_failure(Lane lane, const std::string& call) {
  const std::string message = failure_of(lane);
  BOOST_TEST(message.find("subproblem ") == 0u, message);
  BOOST_TEST(message.find(call) != std::string::npos, message);
  BOOST_TEST(message.find('\n') == std::string::npos, message);
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_copy_in_fails) { check_failure(Lane::copy_in, "copy in"); }
BOOST_AUTO_TEST_CASE(a_kernel_faults) { check_failure(Lane::compute, "attention kernel"); }
BOOST_AUTO_TEST_CASE(a_copy_out_fails) { check_failure(Lane::copy_out, "copy out"); }

BOOST_AUTO_TEST_CASE(a_device_without_room_is_refused) {
  Problem problem;
  problem.query_length = problem.key_length = 1 << 20;
  problem.head_dim = 64;
  problem.dtype = DType::f16;
  problem.scale = default_scale(problem.head_dim);
  const auto backend = make_cuda_backend({});
  PlanRequest request = roomy_request(problem, Layout::bshd, *backend);
  request.chunks = 1;
  Plan plan = make_plan(request);
  plan.device.workspace_bytes += std::int64_t{1} << 42;
  Telemetry telemetry;
  BOOST_CHECK_EXCEPTION(backend->prepare(plan, telemetry), Error, [](const Error& error) {
    return std::string(error.what()).find("--device-memory") != std::string::npos;
  });
}
