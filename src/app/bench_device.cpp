#include "app/bench_device.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "engine/buffer.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {
namespace {

// Elements of unit size, so that scores look like those of a real input: a million random ones,
// over and over.
std::vector<std::byte> random_elements(std::int64_t count, DType type, std::uint32_t seed) {
  std::minstd_rand random(seed);
  std::uniform_real_distribution<float> uniform(-1.7f, 1.7f);
  const auto element = static_cast<std::size_t>(size_of(type));
  const std::size_t all = static_cast<std::size_t>(count) * element;
  std::vector<std::byte> bytes(std::min(all, element << 20));
  for (std::size_t at = 0; at < bytes.size(); at += element) {
    const float value = uniform(random);
    const std::uint16_t half = type == DType::f16 ? f32_to_f16(value) : f32_to_bf16(value);
    std::memcpy(&bytes[at], type == DType::f32 ? static_cast<const void*>(&value) : &half, element);
  }
  bytes.resize(all);
  for (std::size_t done = std::min(all, element << 20); done < all;) {
    const std::size_t more = std::min(done, all - done);
    std::memcpy(&bytes[done], bytes.data(), more);
    done += more;
  }
  return bytes;
}

// One subproblem: one chunk, all heads.
Plan whole_plan(const Problem& problem, const DeviceTraits& traits) {
  PlanRequest request;
  request.problem = problem;
  request.device = traits;
  Plan plan{std::move(request),
            Division(problem, 1, traits.tile),
            {},
            {},
            {},
            {},
            {},
            0,
            0,
            0,
            0,
            {0, 1}};
  plan.groups.push_back({0, problem.kv_heads});
  const std::int64_t vector = problem.head_dim * size_of(storage_type(problem.dtype));
  const std::int64_t rows = problem.query_length * problem.query_heads;
  const auto aligned = [&](std::int64_t bytes) { return round_up(bytes, traits.slot_alignment); };
  DeviceArena& arena = plan.device;
  arena.query_slots = arena.kv_slots = arena.state_slots = 1;
  arena.query_slot_bytes = aligned(rows * vector);
  arena.kv_slot_bytes = 2 * aligned(problem.key_length * problem.kv_heads * vector);
  arena.state_slot_bytes = aligned(softmax_state_bytes(rows, problem.head_dim));
  arena.workspace_bytes = traits.workspace_bytes + traits.query_item_bytes + traits.key_item_bytes;
  return plan;
}

// Copies a whole tensor in.
void load(Backend& backend, const Problem& problem, SlotTensor tensor) {
  const bool query = tensor == SlotTensor::query;
  const DType type = storage_type(problem.dtype);
  CopyIn copy;
  copy.tensor = tensor;
  const std::int64_t tokens = query ? problem.query_length : problem.key_length;
  copy.slot_tokens = tokens;
  copy.heads = query ? problem.query_heads : problem.kv_heads;
  const std::vector<std::byte> elements = random_elements(
      tokens * copy.heads * problem.head_dim, type, 1 + static_cast<std::uint32_t>(tensor));
  const Block block{0, {0, tokens}, {0, copy.heads}};
  copy.rows = {
      {0, tokens,
       packed_rows(elements.data(), block, Layout::bshd, problem.head_dim * size_of(type))}};
  backend.wait(backend.copy_in(copy, {}));
}

WorkList whole_work(const Problem& problem) {
  const Range queries{0, problem.query_length};
  const Range keys{0, problem.key_length};
  WorkList work;
  work.heads = {0, problem.kv_heads};
  work.keys = {{0, keys, problem.liveness(queries, keys) == Liveness::partial}};
  work.queries = {{0, 0, queries, 0, 1}};
  return work;
}

// Floating-point operations of one launch.
double flop_of(const Problem& problem) {
  const auto scores =
      static_cast<double>(problem.query_heads *
                          problem.live_scores({0, problem.query_length}, {0, problem.key_length}));
  return scores * 4.0 * static_cast<double>(problem.head_dim);
}

// Seconds of each of several calls of submit(), which gives the last ticket of some work.
template <typename Submit>
double seconds_each(Backend& backend, int calls, const Submit& submit) {
  backend.wait(submit());
  const double begin = now_seconds();
  Ticket last;
  for (int i = 0; i < calls; ++i) last = submit();
  backend.wait(last);
  return (now_seconds() - begin) / calls;
}

}  // namespace

KernelBench::KernelBench(Backend& backend, const Problem& problem)
    : backend_(backend), work_(whole_work(problem)), flop_(flop_of(problem)) {
  backend_.prepare(whole_plan(problem, backend_.traits(problem)), telemetry_);
  for (const SlotTensor tensor : {SlotTensor::query, SlotTensor::key, SlotTensor::value}) {
    load(backend_, problem, tensor);
  }
}

KernelRate KernelBench::fastest(double seconds) {
  const double begin = now_seconds();
  double best = std::numeric_limits<double>::infinity();
  for (int launches = 0; launches < 2 || now_seconds() - begin < seconds; ++launches) {
    const double start = now_seconds();
    backend_.wait(backend_.launch(work_, {}));
    best = std::min(best, now_seconds() - start);
  }
  return {flop_ / best, best};
}

double KernelBench::steady(double seconds) {
  // One launch ahead, so that the device is never idle.
  Ticket ahead = backend_.launch(work_, {});
  const auto launch = [&] {
    const Ticket next = backend_.launch(work_, {});
    backend_.wait(std::exchange(ahead, next));
  };
  const double begin = now_seconds();
  do launch();
  while (now_seconds() - begin < seconds / 2);
  const double middle = now_seconds();
  int launches = 0;
  do {
    launch();
    ++launches;
  } while (now_seconds() - begin < seconds);
  const double end = now_seconds();
  backend_.wait(ahead);
  return (end - middle) / launches;
}

KernelCost measure_kernel(const std::function<std::unique_ptr<Backend>(const Problem&)>& backend,
                          const Problem& shape, double seconds) {
  // A launch should be long beside what it takes to start one, and short beside `seconds`.
  constexpr double shortest = 20e-3;
  constexpr std::int64_t least = 1024, most = 65536;
  KernelCost cost{shape.head_dim, storage_type(shape.dtype), shape.mask, 0, 0, 0};
  Problem problem = shape;
  for (problem.query_length = least;; problem.query_length *= 2) {
    problem.key_length = problem.query_length;
    const auto device = backend(problem);
    KernelBench bench(*device, problem);
    if (problem.query_length < most && bench.fastest(0).seconds < shortest) continue;
    // Clocks rise while nothing is to be done.
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds / 4));
    cost.burst_flop_per_second = bench.fastest(0).flops;
    cost.flop_per_second =
        std::min(bench.flop() / bench.steady(seconds), cost.burst_flop_per_second);
    break;
  }
  problem.query_length = problem.key_length = 64;
  const auto device = backend(problem);
  KernelBench small(*device, problem);
  cost.launch_seconds =
      std::max(0.0, small.steady(seconds / 10) - small.flop() / cost.burst_flop_per_second);
  return cost;
}

DeviceCopies measure_copies(Backend& backend) {
  constexpr int calls = 16;
  Problem problem;
  problem.dtype = problem.output_dtype = DType::f16;
  problem.query_heads = problem.kv_heads = 8;
  problem.query_length = problem.key_length = 65536;
  problem.head_dim = 64;
  Plan plan = whole_plan(problem, backend.traits(problem));
  plan.device.state_slots = 2;
  Telemetry telemetry;
  backend.prepare(plan, telemetry);
  const HostBuffer memory(plan.device.state_slot_bytes);
  const std::span<std::byte> bytes{memory.data(), static_cast<std::size_t>(memory.bytes())};
  std::ranges::fill(bytes, std::byte{0});
  const auto pin = backend.pin(bytes);

  CopyIn in;
  in.slot_tokens = problem.query_length;
  in.heads = problem.query_heads;
  in.rows = {{0, in.slot_tokens,
              packed_rows(memory.data(), {0, {0, in.slot_tokens}, {0, in.heads}}, Layout::bshd,
                          problem.head_dim * size_of(problem.dtype))}};
  CopyOut out;
  out.slot_rows = problem.query_length * problem.query_heads;
  out.into = softmax_states_at(memory.data(), out.slot_rows, problem.head_dim);
  const auto in_bytes = static_cast<double>(plan.device.query_slot_bytes);
  const auto out_bytes = static_cast<double>(plan.device.state_slot_bytes);
  DeviceCopies rates;
  rates.in = in_bytes / seconds_each(backend, calls, [&] { return backend.copy_in(in, {}); });
  rates.out = out_bytes / seconds_each(backend, calls, [&] { return backend.copy_out(out, {}); });
  if (!plan.request.device.merges) return rates;
  const MergeWork merge{0, 0, 1, out.slot_rows};
  rates.merge = out_bytes / seconds_each(backend, calls, [&] { return backend.merge(merge, {}); });
  return rates;
}

}  // namespace stream_cqsa
