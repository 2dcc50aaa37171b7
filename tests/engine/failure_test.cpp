#define BOOST_TEST_MODULE engine_failure
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <random>

#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/error.hpp"
#include "support/attention.hpp"
#include "support/delayed_backend.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

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
  int left_;
};

struct Fixture {
  Fixture() {
    problem.batch = 1;
    problem.query_heads = problem.kv_heads = 2;
    problem.query_length = problem.key_length = 120;
    problem.head_dim = 8;
    problem.scale = default_scale(8);
    std::mt19937_64 random(4);
    input = random_input(problem, Layout::bshd, 1.0, random);
    PlanRequest request;
    request.problem = problem;
    request.device = make_cpu_backend({2})->traits(problem);
    request.device_budget = request.host_budget = std::int64_t{1} << 28;
    request.chunks = 13;
    request.heads_per_group = 1;
    plan.emplace(make_plan(request));
  }

  void run_with(std::unique_ptr<Backend> backend, int reads, int writes) {
    const auto query = block_source(input.query), value = block_source(input.value);
    FailingSource key(input.key, reads);
    TensorDesc desc = input.query.desc;
    FailingSink sink(desc, writes);
    Telemetry telemetry;
    run(*plan, {*query, key, *value}, {sink, nullptr}, *backend, {}, telemetry);
  }

  Problem problem;
  TestInput input;
  std::optional<Plan> plan;
};

constexpr int enough = 1 << 30;

}  // namespace

BOOST_FIXTURE_TEST_CASE(nothing_fails_when_nothing_is_injected, Fixture) {
  BOOST_CHECK_NO_THROW(run_with(make_cpu_backend({2}), enough, enough));
}

BOOST_FIXTURE_TEST_CASE(a_failing_read_ends_the_run_with_its_own_error, Fixture) {
  for (const int reads : {0, 1, 5, 12}) {
    BOOST_CHECK_EXCEPTION(
        run_with(make_cpu_backend({2}), reads, enough), Error,
        [](const Error& error) { return std::string(error.what()) == "key: injected failure"; });
  }
}

BOOST_FIXTURE_TEST_CASE(a_failing_write_ends_the_run_with_its_own_error, Fixture) {
  for (const int writes : {0, 1, 9, 25}) {
    BOOST_CHECK_EXCEPTION(
        run_with(make_cpu_backend({2}), enough, writes), Error,
        [](const Error& error) { return std::string(error.what()) == "output: injected failure"; });
  }
}

BOOST_FIXTURE_TEST_CASE(a_failing_device_ends_the_run_with_its_own_error, Fixture) {
  for (const Lane lane : {Lane::copy_in, Lane::compute, Lane::copy_out}) {
    for (const int submissions : {0, 1, 7, 20}) {
      BOOST_CHECK_EXCEPTION(
          run_with(std::make_unique<FailingBackend>(make_cpu_backend({2}), lane, submissions),
                   enough, enough),
          Error, [](const Error& error) {
            return std::string(error.what()) == "device: injected failure";
          });
    }
  }
}
