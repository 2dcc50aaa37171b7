// How far reading runs ahead of computing, and how much is read at once.
#define BOOST_TEST_MODULE engine_read_ahead
#include <algorithm>
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <tuple>
#include <vector>

#include "engine/buffer.hpp"
#include "engine/host_cache.hpp"
#include "engine/use_table.hpp"
#include "support/attention.hpp"
#include "support/delayed_backend.hpp"
#include "support/run_plan.hpp"
#include "support/test_backend.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

// Holds a thread until something is so. What never becomes so ends the test as a failure.
class Gate {
 public:
  void update(const std::function<void()>& change) {
    const std::scoped_lock lock(mutex_);
    change();
    changed_.notify_all();
  }
  void wait(const std::function<bool()>& ready) {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, std::chrono::minutes(2), ready)) stuck_ = true;
  }
  bool stuck() {
    const std::scoped_lock lock(mutex_);
    return stuck_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stuck_ = false;
};

// Calls `before` with each block that is read.
class WatchedSource : public TensorSource {
 public:
  using Watch = std::function<void(SlotTensor, const Block&)>;
  WatchedSource(const TestTensor& tensor, SlotTensor name, const Watch& before)
      : TensorSource(tensor.desc), inner_(block_source(tensor)), name_(name), before_(before) {}
  void read(const Block& block, std::span<std::byte> into) override {
    before_(name_, block);
    inner_->read(block, into);
  }

 private:
  std::unique_ptr<TensorSource> inner_;
  SlotTensor name_;
  const Watch& before_;
};

// Calls `before` with the number of each launch, and keeps what is copied in.
class WatchedBackend final : public DelayedBackend {
 public:
  WatchedBackend(std::function<void(int)> before, std::vector<CopyIn>* copies)
      : DelayedBackend(make_test_backend(1), 1), before_(std::move(before)), copies_(copies) {}
  Ticket copy_in(const CopyIn& copy, std::span<const Ticket> after) override {
    if (copies_) copies_->push_back(copy);
    return DelayedBackend::copy_in(copy, after);
  }
  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    before_(launches_++);
    return DelayedBackend::launch(std::move(work), after);
  }

 private:
  std::function<void(int)> before_;
  std::vector<CopyIn>* copies_;
  int launches_ = 0;
};

// A plan whose chunks are read in `blocks` blocks of two tokens each, `cached` of which are kept.
Plan plan_of(std::int64_t chunks, std::int64_t blocks, std::int64_t cached, std::int64_t heads) {
  Problem problem;
  problem.query_heads = problem.kv_heads = heads;
  problem.query_length = problem.key_length = 2 * blocks * chunks;
  problem.head_dim = 8;
  problem.scale = default_scale(8);
  PlanRequest request = roomy_request(problem, Layout::bshd, *make_test_backend(1));
  request.device.tile = 1;
  request.chunks = chunks;
  request.heads_per_group = 1;
  Plan plan = make_plan(request);
  plan.host.cache_blocks = cached;
  plan.host.cache_block_bytes = 64 * heads;
  plan.query_block_tokens = plan.key_block_tokens = 2;
  return plan;
}

TestInput input_of(const Plan& plan, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  return random_input(plan.problem(), Layout::bshd, 1.0, random);
}

// The largest error of a run whose reads and launches are watched.
double watched_run(const Plan& plan, const TestInput& input, const WatchedSource::Watch& read,
                   const std::function<void(int)>& launch, int read_threads,
                   std::vector<CopyIn>* copies = nullptr) {
  WatchedSource query(input.query, SlotTensor::query, read);
  WatchedSource key(input.key, SlotTensor::key, read);
  WatchedSource value(input.value, SlotTensor::value, read);
  WatchedBackend backend(launch, copies);
  const TensorDesc desc = input.query.desc;
  std::vector<std::byte> output(static_cast<std::size_t>(desc.bytes()));
  const TensorDesc lse = lse_desc(1, desc.heads, desc.tokens);
  std::vector<std::byte> lse_output(static_cast<std::size_t>(lse.bytes()));
  const auto sink = make_memory_sink(desc, output);
  const auto lse_sink = make_memory_sink(lse, lse_output);
  Telemetry telemetry;
  RunOptions options;
  options.read_threads = read_threads;
  run(plan, {query, key, value}, {*sink, lse_sink.get()}, backend, options, telemetry);
  return largest_error(desc, output, brute_force(plan.problem(), input).output);
}

}  // namespace

BOOST_AUTO_TEST_CASE(what_fits_is_read_before_anything_is_computed) {
  const Plan plan = plan_of(7, 8, 7 * 8 * 3, 1);
  Gate gate;
  int blocks = 0;
  const double error = watched_run(
      plan, input_of(plan, 1), [&](SlotTensor, const Block&) { gate.update([&] { ++blocks; }); },
      [&](int) { gate.wait([&] { return blocks == 7 * 8 * 3; }); }, 2);
  BOOST_TEST(!gate.stuck());
  BOOST_TEST(error <= 2e-5);
}

BOOST_AUTO_TEST_CASE(blocks_that_are_read_are_copied_together) {
  // All are read before the first launch, behind which the other chunks are copied.
  const Plan plan = plan_of(7, 8, 7 * 8 * 3, 1);
  Gate gate;
  int blocks = 0;
  std::vector<CopyIn> copies;
  const double error = watched_run(
      plan, input_of(plan, 5), [&](SlotTensor, const Block&) { gate.update([&] { ++blocks; }); },
      [&](int) { gate.wait([&] { return blocks == 7 * 8 * 3; }); }, 2, &copies);
  BOOST_TEST(!gate.stuck());
  BOOST_TEST(error <= 2e-5);
  std::size_t most = 0;
  using Load = std::tuple<std::int64_t, SlotTensor, std::int32_t>;  // subproblem, tensor, slot
  std::map<Load, std::vector<int>> times;                           // that each token was copied
  for (const CopyIn& copy : copies) {
    most = std::max(most, copy.rows.size());
    auto& tokens = times[{copy.subproblem, copy.tensor, copy.slot}];
    tokens.resize(static_cast<std::size_t>(copy.slot_tokens));
    for (const SlotRows& rows : copy.rows) {
      for (std::int64_t i = 0; i < rows.tokens; ++i)
        ++tokens.at(static_cast<std::size_t>(rows.first_token + i));
    }
  }
  BOOST_TEST(most == 8u);
  for (const auto& [load, tokens] : times)
    BOOST_TEST(std::all_of(tokens.begin(), tokens.end(), [](int count) { return count == 1; }));
}

BOOST_AUTO_TEST_CASE(a_queue_gives_its_next_element_only_where_it_is_wanted) {
  Abort abort;
  BoundedQueue<int> queue(abort, 3);
  const auto is_even = [](int value) { return value % 2 == 0; };
  BOOST_TEST(!queue.try_pop_if(is_even));
  for (const int value : {2, 3, 4}) queue.push(value);
  BOOST_TEST(queue.try_pop_if(is_even).value() == 2);
  BOOST_TEST(!queue.try_pop_if(is_even));
  BOOST_TEST(queue.pop().value() == 3);
  queue.close();
  BOOST_TEST(queue.try_pop_if(is_even).value() == 4);
  BOOST_TEST(!queue.try_pop_if(is_even));
}

BOOST_AUTO_TEST_CASE(reading_is_few_subproblems_ahead) {
  // As many as may be scheduled and not launched; more of them would hold more pairs.
  constexpr std::int64_t most_ahead = 8;
  const Plan plan = plan_of(57, 1, 57 * 3, 1);
  std::map<std::int64_t, std::int64_t> first_use;  // by first token
  for (std::int64_t id = plan.subproblem_count(); id-- > 0;) {
    for (const Chunk& chunk : plan.work(id).chunks) first_use[chunk.keys.begin] = id;
  }
  std::atomic<std::int64_t> launched{0};
  std::atomic<std::int64_t> farthest{0}, too_far{0};
  const double error = watched_run(
      plan, input_of(plan, 2),
      [&](SlotTensor, const Block& block) {
        const std::int64_t ahead = first_use.at(block.tokens.begin) - launched;
        too_far += ahead > most_ahead;
        if (ahead > farthest) farthest = ahead;
      },
      [&](int) { ++launched; }, 2);
  BOOST_TEST_MESSAGE("at most " << farthest << " subproblems ahead");
  BOOST_TEST(too_far == 0);
  BOOST_TEST(error <= 2e-5);
}

BOOST_AUTO_TEST_CASE(every_reader_has_a_read_under_way) {
  for (const std::int64_t cached : {12, 168}) {
    const Plan plan = plan_of(7, 8, cached, 1);
    Gate gate;
    int under_way = 0;
    bool all = false;
    const double error = watched_run(
        plan, input_of(plan, 3),
        [&](SlotTensor, const Block&) {
          gate.update([&] { all = ++under_way == 5 || all; });
          gate.wait([&] { return all; });
          gate.update([&] { --under_way; });
        },
        [](int) {}, 5);
    BOOST_TEST(!gate.stuck());
    BOOST_TEST(error <= 2e-5);
  }
}

BOOST_AUTO_TEST_CASE(any_number_of_blocks_and_slow_reads_give_the_same) {
  std::mt19937_64 random(4);
  for (int trial = 0; trial < trials(40); ++trial) {
    constexpr std::int64_t numbers[] = {1, 2, 3, 5, 17, 40, 100, 1000};
    const std::int64_t cached = numbers[trial % 8];
    const auto chunks = static_cast<std::int64_t>(1 + random() % 13);
    const auto blocks = static_cast<std::int64_t>(1 + random() % 6);
    const auto heads = static_cast<std::int64_t>(1 + random() % 2);
    const Plan plan = plan_of(chunks, blocks, cached, heads);
    std::mutex mutex;
    const double error = watched_run(
        plan, input_of(plan, random()),
        [&](SlotTensor, const Block&) {
          std::unique_lock lock(mutex);
          const auto pause = random() % 4 == 0 ? random() % 300 : 0;
          lock.unlock();
          std::this_thread::sleep_for(std::chrono::microseconds(pause));
        },
        [](int) {}, 1 + trial % 4);
    BOOST_TEST_INFO("trial " << trial << ", blocks cached " << cached);
    BOOST_TEST(error <= 2e-5);
  }
}

BOOST_AUTO_TEST_CASE(blocks_that_nothing_uses_again_are_given_up_for_any_number_of_requests) {
  const Plan plan = plan_of(1, 200, 100, 1);
  const TestInput input = input_of(plan, 5);
  const auto query = block_source(input.query), key = block_source(input.key);
  const auto value = block_source(input.value);
  const HostBuffer memory(plan.host.bytes());
  const auto backend = make_cpu_backend({1});
  Telemetry telemetry;
  Abort abort;
  const Inputs inputs{*query, *key, *value};
  HostCache cache(plan, inputs, memory.data(), *backend, telemetry, abort);
  Crew crew(abort);
  crew.start([&] { cache.read_blocks(); });
  const auto request = [&](std::int64_t block) {
    return cache.request(SlotTensor::query, {0, {2 * block, 2 * block + 2}, {0, 1}}, block, never);
  };
  for (std::int64_t block = 0; block < 100; ++block) {
    const std::int32_t number = request(block);
    cache.wait_read(number);
    cache.release(number, Ticket{Lane::copy_in, 0});
  }
  std::vector<std::int32_t> numbers;
  for (std::int64_t block = 100; block < 200; ++block) numbers.push_back(request(block));
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const std::byte* expected = input.query.data.data() + (100 + i) * 64;
    BOOST_TEST(std::memcmp(cache.wait_read(numbers[i]).data, expected, 64) == 0);
  }
  cache.close();
  crew.join();
  abort.rethrow_if_failed();
}
