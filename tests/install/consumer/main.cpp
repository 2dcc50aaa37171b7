// A program outside the project that embeds the installed library: plans a small problem, computes
// it from and into memory, and compares with the definition.
#include <cmath>
#include <cstdint>
#include <iostream>
#include <random>
#include <span>
#include <vector>

#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/files.hpp"

namespace {

constexpr std::int64_t length = 300;
constexpr std::int64_t dim = 16;

// q, k, v, o: [token][dim], one head
std::vector<float> random_rows(unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(length * dim);
  for (float& value : rows) value = normal(random);
  return rows;
}

std::vector<double> definition(const std::vector<float>& q, const std::vector<float>& k,
                               const std::vector<float>& v, double scale) {
  std::vector<double> output(q.size(), 0.0);
  for (std::int64_t row = 0; row < length; ++row) {
    double total = 0;
    for (std::int64_t key = 0; key <= row; ++key) {
      double score = 0;
      for (std::int64_t i = 0; i < dim; ++i) score += q[row * dim + i] * k[key * dim + i];
      const double weight = std::exp(scale * score);
      total += weight;
      for (std::int64_t i = 0; i < dim; ++i) output[row * dim + i] += weight * v[key * dim + i];
    }
    for (std::int64_t i = 0; i < dim; ++i) output[row * dim + i] /= total;
  }
  return output;
}

}  // namespace

int main() {
  using namespace stream_cqsa;
  Problem problem;
  problem.query_length = problem.key_length = length;
  problem.head_dim = dim;
  problem.mask = Mask::causal;
  problem.scale = default_scale(dim);
  const auto backend = make_cpu_backend({});

  PlanRequest request;
  request.problem = problem;
  request.device = backend->traits(problem);
  request.query.resident = request.key.resident = request.value.resident = true;
  request.device_budget = request.host_budget = std::int64_t{64} << 20;
  request.chunks = 7;
  const Plan plan = make_plan(request);

  const std::vector<float> q = random_rows(1), k = random_rows(2), v = random_rows(3);
  std::vector<float> o(q.size());
  const TensorDesc desc{"memory", DType::f32, Layout::bshd, 4, 1, length, 1, dim};
  const auto query = make_memory_source(desc, std::as_bytes(std::span(q)));
  const auto key = make_memory_source(desc, std::as_bytes(std::span(k)));
  const auto value = make_memory_source(desc, std::as_bytes(std::span(v)));
  const auto output = make_memory_sink(desc, std::as_writable_bytes(std::span(o)));
  Telemetry telemetry;
  run(plan, {*query, *key, *value}, {*output}, *backend, {}, telemetry);

  const std::vector<double> expected = definition(q, k, v, problem.scale);
  std::cout << describe(plan);
  for (std::size_t i = 0; i < o.size(); ++i) {
    if (std::abs(o[i] - expected[i]) <= 1e-5) continue;
    std::cerr << "element " << i << " is " << o[i] << ", not " << expected[i] << '\n';
    return 1;
  }
}
