// Errors on the device end a run with one line that names the subproblem and the call. A fault in a
// kernel spoils CUDA for the whole process: CTest runs every case in one of its own.
// No copy fails here while it is under way: CUDA refuses a bad address when the copy is submitted,
// and memory taken away from a copy that waits would be undefined behaviour of the test itself.
#define BOOST_TEST_MODULE cuda_device_error
#include <array>
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <chrono>
#include <functional>
#include <random>
#include <semaphore>
#include <string>
#include <thread>
#include <utility>

#include "cuda/check.hpp"
#include "cuda/lanes.hpp"
#include "spoiling_backend.hpp"
#include "stream_cqsa/cuda_backend.hpp"
#include "stream_cqsa/error.hpp"
#include "support/needs_device.hpp"
#include "support/run_plan.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_GLOBAL_FIXTURE(NeedsDevice);

namespace {

std::string failure_of(SpoilingBackend& backend, DType dtype, AccumulatorPlacement placement,
                       std::int64_t chunks) {
  Problem problem;
  problem.query_length = problem.key_length = 3000;
  problem.head_dim = 40;
  problem.dtype = dtype;
  problem.scale = default_scale(problem.head_dim);
  PlanRequest request = roomy_request(problem, Layout::bshd, backend, placement);
  request.chunks = chunks;
  std::mt19937_64 random(1);
  const TestInput input = random_input(problem, Layout::bshd, 1.0, random);
  try {
    run_plan(make_plan(request), input, backend, false);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

void check_failure(Call call, const std::string& text,
                   AccumulatorPlacement placement = AccumulatorPlacement::memory,
                   DType dtype = DType::f32, int number = 4, std::int64_t chunks = 7) {
  SpoilingBackend backend(call, number);
  const std::string message = failure_of(backend, dtype, placement, chunks);
  BOOST_TEST(backend.spoilt());
  BOOST_TEST(message.find("subproblem ") == 0u, message);
  BOOST_TEST(message.find(text) != std::string::npos, message);
  BOOST_TEST(message.find('\n') == std::string::npos, message);
}

// Which of several kernels under way has faulted CUDA does not tell.
const std::string some_kernel = " kernel: ";
constexpr auto on_device = AccumulatorPlacement::device;

std::string failure_of(cuda::Lanes& lanes, Ticket ticket) {
  try {
    lanes.wait(ticket);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

cuda::Submission submission(const std::string& call, std::function<void(cudaStream_t)> enqueue) {
  return {call, Stage::compute, 0, 1, std::move(enqueue)};
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_copy_in_fails) { check_failure(Call::copy_in, "copy in"); }
BOOST_AUTO_TEST_CASE(a_kernel_faults) { check_failure(Call::launch, "attention kernel"); }
BOOST_AUTO_TEST_CASE(a_copy_out_fails) { check_failure(Call::copy_out, "copy out"); }
BOOST_AUTO_TEST_CASE(a_kernel_of_16_bits_faults) {
  check_failure(Call::launch, "attention kernel", AccumulatorPlacement::memory, DType::f16);
}
BOOST_AUTO_TEST_CASE(a_merge_faults) { check_failure(Call::merge, some_kernel, on_device); }
BOOST_AUTO_TEST_CASE(an_end_of_rows_faults) {
  check_failure(Call::finalise, some_kernel, on_device, DType::bf16);
}
BOOST_AUTO_TEST_CASE(a_copy_out_of_finished_rows_fails) {
  check_failure(Call::copy_out_rows, "copy out of finished rows", on_device, DType::f16);
}

// Copies of the same subproblem follow it, and no subproblem does.
BOOST_AUTO_TEST_CASE(the_first_copy_in_of_the_last_subproblem_fails) {
  check_failure(Call::copy_in, "copy in", AccumulatorPlacement::memory, DType::f32, 1, 1);
}

BOOST_AUTO_TEST_CASE(what_comes_after_a_failure_is_not_enqueued) {
  Telemetry telemetry;
  std::binary_semaphore go(0);
  cuda::use_device(0);
  cuda::Lanes lanes(0, telemetry);
  // As long as it is held, nobody can have learned from its end that the next has failed.
  const auto hold = [&](cudaStream_t stream) {
    const auto wait = [](void* at) { static_cast<std::binary_semaphore*>(at)->acquire(); };
    STREAM_CQSA_CUDA_CHECK(cudaLaunchHostFunc(stream, wait, &go));
  };
  const Ticket held = lanes.submit(Lane::copy_in, submission("held", hold), {});
  const Ticket refused = lanes.submit(
      Lane::copy_in, submission("copy in", [](cudaStream_t) { throw Error("refused"); }), {});
  int enqueued = 0;
  const auto counted = submission("later", [&](cudaStream_t) { ++enqueued; });
  const Ticket later = lanes.submit(Lane::copy_in, counted, {});
  const Ticket waiting = lanes.submit(Lane::compute, counted, std::array{later});
  const Ticket after_it = lanes.submit(Lane::compute, counted, {});
  const Ticket independent =
      lanes.submit(Lane::copy_out, submission("other", [](cudaStream_t) {}), {});
  go.release();
  BOOST_TEST(enqueued == 0);
  for (const Ticket ticket : {refused, later, waiting, after_it}) {
    BOOST_TEST(failure_of(lanes, ticket) == "subproblem 1: copy in: refused");
  }
  BOOST_TEST(failure_of(lanes, held) == "no error");
  BOOST_TEST(failure_of(lanes, independent) == "no error");
}

BOOST_AUTO_TEST_CASE(quiet_lanes_have_ended_what_failed_half_enqueued) {
  Telemetry telemetry;
  std::atomic<bool> ended = false;
  cuda::use_device(0);
  cuda::Lanes lanes(0, telemetry);
  const auto fail_half_enqueued = [&](cudaStream_t stream) {
    const auto end = [](void* at) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      *static_cast<std::atomic<bool>*>(at) = true;
    };
    STREAM_CQSA_CUDA_CHECK(cudaLaunchHostFunc(stream, end, &ended));
    throw Error("the second half");
  };
  lanes.submit(Lane::copy_out, submission("copy out", fail_half_enqueued), {});
  lanes.quiesce();
  BOOST_TEST(ended.load());
}

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
  BOOST_CHECK_EXCEPTION(
      backend->prepare(plan, telemetry), OutOfDeviceMemory, [&](const OutOfDeviceMemory& error) {
        const std::string message = error.what();
        return error.free_bytes() > 0 && error.free_bytes() < plan.device.bytes() &&
               message.find("--device-memory") != std::string::npos;
      });
  // Whoever allocates less goes on.
  const Plan smaller = make_plan(request);
  backend->prepare(smaller, telemetry);
  BOOST_TEST(backend->allocated_bytes() == smaller.device.bytes());
  BOOST_TEST(backend->memory_in_use() >= smaller.device.bytes());
}
