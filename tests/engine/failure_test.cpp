#define BOOST_TEST_MODULE engine_failure
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <cstdlib>
#include <limits>
#include <new>
#include <random>

#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/error.hpp"
#include "support/attention.hpp"
#include "support/delayed_backend.hpp"
#include "support/test_backend.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

// A larger allocation than this fails.
std::atomic<std::size_t> allocation_limit{std::numeric_limits<std::size_t>::max()};

}  // namespace

// Not inlined: the compiler would see malloc() or free() paired with the other's operator.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  void* memory = bytes > allocation_limit ? nullptr : std::malloc(bytes);
  if (!memory) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

// A source whose reads fail after a number of good ones.
class FailingSource : public TensorSource {
 public:
  FailingSource(const TestTensor& tensor, int reads)
      : TensorSource(tensor.desc), inner_(block_source(tensor)), left_(reads) {}
  void read(const Block& block, std::span<std::byte> into) override {
    if (left_-- <= 0) throw Error("key: injected failure");
    inner_->read(block, into);
  }

 private:
  std::unique_ptr<TensorSource> inner_;
  std::atomic<int> left_;
};

class FailingSink : public TensorSink {
 public:
  FailingSink(TensorDesc desc, int writes) : TensorSink(std::move(desc)), left_(writes) {}
  void write(const Block&, std::span<const std::byte>) override {
    if (left_-- <= 0) throw Error("output: injected failure");
  }
  void commit() override {}

 private:
  std::atomic<int> left_;
};

// Gives one launch, the nth, so many keys that no query refers to that the CPU backend runs out of
// memory when it computes.
class OverfullBackend : public DelayedBackend {
 public:
  OverfullBackend(std::unique_ptr<Backend> inner, int launches)
      : DelayedBackend(std::move(inner), 1), left_(launches) {}
  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    if (left_-- == 0) {
      subproblem_ = work.subproblem;
      work.keys.resize(std::size_t{1} << 20);
      allocation_limit = work.keys.size() * sizeof(KeyWork);
    }
    return DelayedBackend::launch(std::move(work), after);
  }
  std::int64_t subproblem() const { return subproblem_; }

 private:
  int left_;
  std::int64_t subproblem_ = -1;
};

struct Fixture {
  Fixture() : Fixture(AccumulatorPlacement::memory) {}
  explicit Fixture(AccumulatorPlacement placement) {
    problem.batch = 1;
    problem.query_heads = problem.kv_heads = 2;
    problem.query_length = problem.key_length = 120;
    problem.head_dim = 8;
    problem.scale = default_scale(8);
    std::mt19937_64 random(4);
    input = random_input(problem, Layout::bshd, 1.0, random);
    PlanRequest request;
    request.problem = problem;
    request.device = make_test_backend(2)->traits(problem);
    request.device.merges = placement == AccumulatorPlacement::device;
    request.device_budget = request.host_budget = std::int64_t{1} << 28;
    request.chunks = 13;
    request.heads_per_group = 1;
    plan.emplace(make_plan(request));
    if (plan->placement != placement) throw std::logic_error("the plan is another");
  }

  void run_with(std::unique_ptr<Backend> backend, int reads, int writes) {
    run_on(*backend, reads, writes);
  }
  void run_on(Backend& backend, int reads, int writes) {
    const auto query = block_source(input.query), value = block_source(input.value);
    FailingSource key(input.key, reads);
    TensorDesc desc = input.query.desc;
    FailingSink sink(desc, writes);
    Telemetry telemetry;
    run(*plan, {*query, key, *value}, {sink, nullptr}, backend, {}, telemetry);
  }

  Problem problem;
  TestInput input;
  std::optional<Plan> plan;
};

struct DeviceFixture : Fixture {
  DeviceFixture() : Fixture(AccumulatorPlacement::device) {}
};

constexpr int enough = 1 << 30;

}  // namespace

BOOST_FIXTURE_TEST_CASE(nothing_fails_when_nothing_is_injected, Fixture) {
  BOOST_CHECK_NO_THROW(run_with(make_test_backend(2), enough, enough));
}

BOOST_FIXTURE_TEST_CASE(a_failing_read_ends_the_run_with_its_own_error, Fixture) {
  for (const int reads : {0, 1, 5, 12}) {
    BOOST_CHECK_EXCEPTION(
        run_with(make_test_backend(2), reads, enough), Error,
        [](const Error& error) { return std::string(error.what()) == "key: injected failure"; });
  }
}

BOOST_FIXTURE_TEST_CASE(a_failing_write_ends_the_run_with_its_own_error, Fixture) {
  for (const int writes : {0, 1, 9, 25}) {
    BOOST_CHECK_EXCEPTION(
        run_with(make_test_backend(2), enough, writes), Error,
        [](const Error& error) { return std::string(error.what()) == "output: injected failure"; });
  }
}

BOOST_FIXTURE_TEST_CASE(a_failing_device_ends_the_run_with_its_own_error, Fixture) {
  for (const Lane lane : {Lane::copy_in, Lane::compute, Lane::copy_out}) {
    for (const int submissions : {0, 1, 7, 20}) {
      BOOST_CHECK_EXCEPTION(
          run_with(std::make_unique<FailingBackend>(make_test_backend(2), lane, submissions),
                   enough, enough),
          Error, [](const Error& error) {
            return std::string(error.what()) == "device: injected failure";
          });
    }
  }
}

BOOST_FIXTURE_TEST_CASE(work_that_fails_in_a_lane_ends_the_run_with_its_subproblem, Fixture) {
  for (const Lane lane : {Lane::copy_in, Lane::compute, Lane::copy_out}) {
    for (const int submissions : {0, 1, 7, 20}) {
      LateFailingBackend backend(make_test_backend(2), lane, submissions);
      BOOST_CHECK_EXCEPTION(run_on(backend, enough, enough), Error, [&](const Error& error) {
        const std::string message = error.what();
        return message.starts_with("subproblem ") && message == backend.message();
      });
    }
  }
}

// Merges, finishing and copies of finished rows fail in turn.
BOOST_FIXTURE_TEST_CASE(failures_with_accumulators_on_the_device_end_the_run_too, DeviceFixture) {
  BOOST_CHECK_NO_THROW(run_with(make_test_backend(2), enough, enough));
  BOOST_CHECK_EXCEPTION(run_with(make_test_backend(2), enough, 9), Error, [](const Error& error) {
    return std::string(error.what()) == "output: injected failure";
  });
  for (const Lane lane : {Lane::copy_in, Lane::compute, Lane::copy_out}) {
    for (const int submissions : {0, 1, 2, 3, 4, 5, 6, 7, 20}) {
      BOOST_CHECK_EXCEPTION(
          run_with(std::make_unique<FailingBackend>(make_test_backend(2), lane, submissions),
                   enough, enough),
          Error, [](const Error& error) {
            return std::string(error.what()) == "device: injected failure";
          });
      LateFailingBackend backend(make_test_backend(2), lane, submissions);
      BOOST_CHECK_EXCEPTION(run_on(backend, enough, enough), Error, [&](const Error& error) {
        const std::string message = error.what();
        return message.starts_with("subproblem ") && message == backend.message();
      });
    }
  }
}

BOOST_FIXTURE_TEST_CASE(a_kernel_that_runs_out_of_memory_ends_the_run_with_its_subproblem,
                        Fixture) {
  if (on_cuda()) return;  // its kernels allocate nothing
  for (const int launches : {0, 3, 11}) {
    OverfullBackend backend(make_test_backend(2), launches);
    BOOST_CHECK_EXCEPTION(run_on(backend, enough, enough), Error, [&](const Error& error) {
      return error.what() == "subproblem " + std::to_string(backend.subproblem()) +
                                 ": compute on the CPU: std::bad_alloc";
    });
    allocation_limit = std::numeric_limits<std::size_t>::max();
  }
}
