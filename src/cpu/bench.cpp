#include "cpu/bench.hpp"

#include <cblas.h>

#include <algorithm>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "cpu/thread_pool.hpp"
#include "stream_cqsa/backend.hpp"

namespace stream_cqsa {
namespace {

// Elements of unit size, so that scores look like those of a real input.
std::vector<std::byte> random_elements(std::int64_t count, DType type, std::uint32_t seed) {
  std::minstd_rand random(seed);
  std::uniform_real_distribution<float> uniform(-1.7f, 1.7f);
  std::vector<std::byte> bytes(static_cast<std::size_t>(count * size_of(type)));
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = uniform(random);
    if (type == DType::f32) {
      reinterpret_cast<float*>(bytes.data())[i] = value;
    } else {
      reinterpret_cast<std::uint16_t*>(bytes.data())[i] =
          type == DType::f16 ? f32_to_f16(value) : f32_to_bf16(value);
    }
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
  arena.workspace_bytes = traits.workspace_bytes;
  return plan;
}

void load(Backend& backend, const Problem& problem, SlotTensor tensor) {
  const bool query = tensor == SlotTensor::query;
  const DType type = storage_type(problem.dtype);
  CopyIn copy;
  copy.tensor = tensor;
  copy.tokens = copy.slot_tokens = query ? problem.query_length : problem.key_length;
  copy.heads = query ? problem.query_heads : problem.kv_heads;
  const std::vector<std::byte> elements = random_elements(
      copy.tokens * copy.heads * problem.head_dim, type, 1 + static_cast<std::uint32_t>(tensor));
  const Block block{0, {0, copy.tokens}, {0, copy.heads}};
  copy.source = packed_rows(elements.data(), block, Layout::bshd, problem.head_dim * size_of(type));
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

}  // namespace

double bench_sgemm_flops(int threads) {
  constexpr int size = 1024;
  constexpr int products = 4;
  constexpr int rounds = 5;
  constexpr auto elements = std::size_t{size} * size;
  openblas_set_num_threads(1);
  ThreadPool pool(available_threads(threads));
  const auto workers = static_cast<std::size_t>(pool.threads());
  const std::vector<float> a(elements, 0.5f);
  const std::vector<float> b(elements, 0.25f);
  std::vector<std::vector<float>> c(workers, std::vector<float>(elements));
  double best = std::numeric_limits<double>::infinity();
  for (int round = 0; round < rounds; ++round) {
    const double begin = now_seconds();
    pool.run([&](int worker) {
      float* to = c[static_cast<std::size_t>(worker)].data();
      for (int i = 0; i < products; ++i) {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, size, size, size, 1.0f, a.data(),
                    size, b.data(), size, 0.0f, to, size);
      }
    });
    best = std::min(best, now_seconds() - begin);
  }
  return 2.0 * size * size * size * products * pool.threads() / best;
}

KernelRate bench_kernel(const Problem& problem, int threads, double seconds) {
  const auto backend = make_cpu_backend({.threads = threads});
  Telemetry telemetry;
  backend->prepare(whole_plan(problem, backend->traits(problem)), telemetry);
  for (const SlotTensor tensor : {SlotTensor::query, SlotTensor::key, SlotTensor::value}) {
    load(*backend, problem, tensor);
  }
  const WorkList work = whole_work(problem);
  const double begin = now_seconds();
  double best = std::numeric_limits<double>::infinity();
  for (int launches = 0; launches < 2 || now_seconds() - begin < seconds; ++launches) {
    const double start = now_seconds();
    backend->wait(backend->launch(work, {}));
    best = std::min(best, now_seconds() - start);
  }
  const auto scores =
      static_cast<double>(problem.query_heads *
                          problem.live_scores({0, problem.query_length}, {0, problem.key_length}));
  return {scores * 4.0 * static_cast<double>(problem.head_dim) / best, best};
}

}  // namespace stream_cqsa
