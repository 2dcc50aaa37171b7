#include "support/attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace stream_cqsa::testing {
namespace {

std::size_t place(const TensorDesc& desc, std::int64_t batch, std::int64_t token, std::int64_t head,
                  std::int64_t i) {
  const std::int64_t vector = desc.layout == Layout::bshd
                                  ? (batch * desc.tokens + token) * desc.heads + head
                                  : (batch * desc.heads + head) * desc.tokens + token;
  return static_cast<std::size_t>(vector * desc.dim + i);
}

double store(std::byte* data, DType dtype, std::size_t index, double value) {
  const auto as_float = static_cast<float>(value);
  if (dtype == DType::f32) {
    std::memcpy(data + index * 4, &as_float, 4);
    return as_float;
  }
  const std::uint16_t bits = dtype == DType::f16 ? f32_to_f16(as_float) : f32_to_bf16(as_float);
  std::memcpy(data + index * 2, &bits, 2);
  return dtype == DType::f16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

double load(const std::byte* data, DType dtype, std::size_t index) {
  if (dtype == DType::f64) {
    double value;
    std::memcpy(&value, data + index * 8, 8);
    return value;
  }
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, data + index * 4, 4);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, data + index * 2, 2);
  return dtype == DType::f16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

class BlockSource : public TensorSource {
 public:
  explicit BlockSource(const TestTensor& tensor)
      : TensorSource(tensor.desc), memory_(make_memory_source(tensor.desc, tensor.data)) {}
  void read(const Block& block, std::span<std::byte> into) override { memory_->read(block, into); }

 private:
  std::unique_ptr<TensorSource> memory_;
};

}  // namespace

TestTensor random_tensor(TensorDesc desc, double magnitude, std::mt19937_64& random) {
  TestTensor tensor;
  tensor.desc = desc;
  const auto count = static_cast<std::size_t>(desc.elements());
  tensor.data.resize(count * static_cast<std::size_t>(size_of(storage_type(desc.dtype))));
  tensor.elements.resize(count);
  std::uniform_real_distribution<double> uniform(-magnitude, magnitude);
  for (std::int64_t b = 0; b < desc.batch; ++b)
    for (std::int64_t n = 0; n < desc.tokens; ++n)
      for (std::int64_t h = 0; h < desc.heads; ++h)
        for (std::int64_t i = 0; i < desc.dim; ++i)
          set_element(tensor, b, n, h, i, uniform(random));
  return tensor;
}

TestInput random_input(const Problem& problem, Layout layout, double magnitude,
                       std::mt19937_64& random) {
  TensorDesc query{"query",
                   problem.dtype,
                   layout,
                   4,
                   problem.batch,
                   problem.query_length,
                   problem.query_heads,
                   problem.head_dim};
  TensorDesc key{"key",         problem.dtype,      layout,           4,
                 problem.batch, problem.key_length, problem.kv_heads, problem.head_dim};
  TensorDesc value = key;
  value.name = "value";
  return {random_tensor(query, magnitude, random), random_tensor(key, magnitude, random),
          random_tensor(value, magnitude, random)};
}

void set_element(TestTensor& tensor, std::int64_t batch, std::int64_t token, std::int64_t head,
                 std::int64_t i, double value) {
  const TensorDesc& desc = tensor.desc;
  const auto row_major =
      static_cast<std::size_t>(((batch * desc.tokens + token) * desc.heads + head) * desc.dim + i);
  tensor.elements[row_major] = store(tensor.data.data(), storage_type(desc.dtype),
                                     place(desc, batch, token, head, i), value);
}

Expected brute_force(const Problem& problem, const TestInput& input) {
  Expected expected;
  const std::int64_t ratio = problem.query_heads_per_kv_head();
  expected.output.resize(static_cast<std::size_t>(input.query.desc.elements()));
  expected.lse.resize(
      static_cast<std::size_t>(problem.batch * problem.query_heads * problem.query_length));
  std::vector<double> scores;
  const std::int64_t sequence =
      problem.queries_before + problem.query_length + problem.queries_after;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    for (std::int64_t h = 0; h < problem.query_heads; ++h) {
      for (std::int64_t n = 0; n < problem.query_length; ++n) {
        const std::int64_t token = problem.queries_before + n;
        const std::int64_t keys =
            problem.mask == Mask::none
                ? problem.key_length
                : std::clamp<std::int64_t>(token + 1 + problem.key_length - sequence, 0,
                                           problem.key_length);
        scores.assign(static_cast<std::size_t>(keys), 0.0);
        double max = -std::numeric_limits<double>::infinity();
        for (std::int64_t j = 0; j < keys; ++j) {
          double dot = 0;
          for (std::int64_t i = 0; i < problem.head_dim; ++i) {
            dot += input.query.at(b, n, h, i) * input.key.at(b, j, h / ratio, i);
          }
          scores[static_cast<std::size_t>(j)] = dot * problem.scale;
          max = std::max(max, dot * problem.scale);
        }
        double sum = 0;
        std::vector<double> row(static_cast<std::size_t>(problem.head_dim), 0.0);
        for (std::int64_t j = 0; j < keys; ++j) {
          const double weight = std::exp(scores[static_cast<std::size_t>(j)] - max);
          sum += weight;
          for (std::int64_t i = 0; i < problem.head_dim; ++i) {
            row[static_cast<std::size_t>(i)] += weight * input.value.at(b, j, h / ratio, i);
          }
        }
        expected.lse[static_cast<std::size_t>((b * problem.query_heads + h) * problem.query_length +
                                              n)] =
            keys ? max + std::log(sum) : -std::numeric_limits<double>::infinity();
        for (std::int64_t i = 0; i < problem.head_dim; ++i) {
          expected.output[static_cast<std::size_t>(
              ((b * problem.query_length + n) * problem.query_heads + h) * problem.head_dim + i)] =
              keys ? row[static_cast<std::size_t>(i)] / sum : 0.0;
        }
      }
    }
  }
  return expected;
}

std::unique_ptr<TensorSource> block_source(const TestTensor& tensor) {
  return std::make_unique<BlockSource>(tensor);
}

double largest_error(const TensorDesc& desc, const std::vector<std::byte>& output,
                     const std::vector<double>& expected) {
  double largest = 0;
  std::size_t index = 0;
  for (std::int64_t b = 0; b < desc.batch; ++b) {
    for (std::int64_t n = 0; n < desc.tokens; ++n) {
      for (std::int64_t h = 0; h < desc.heads; ++h) {
        for (std::int64_t i = 0; i < desc.dim; ++i, ++index) {
          const double got = load(output.data(), desc.dtype, place(desc, b, n, h, i));
          const double want = expected[index];
          if (std::isfinite(got) != std::isfinite(want)) {
            return std::numeric_limits<double>::infinity();
          }
          if (std::isfinite(want)) largest = std::max(largest, std::abs(got - want));
        }
      }
    }
  }
  return largest;
}

Problem random_problem(std::mt19937_64& random, std::int64_t longest, std::int64_t largest_dim,
                       std::int64_t dim_step) {
  const auto pick = [&](std::int64_t from, std::int64_t to) {
    return from + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(to - from + 1));
  };
  constexpr DType types[] = {DType::f16, DType::bf16, DType::f32};
  Problem problem;
  problem.batch = pick(1, 2);
  problem.kv_heads = pick(1, 3);
  problem.query_heads = problem.kv_heads * pick(1, 3);
  problem.query_length = pick(1, longest);
  problem.key_length = random() % 2 ? problem.query_length : pick(1, longest);
  problem.head_dim = dim_step * pick(1, largest_dim / dim_step);
  problem.dtype = types[random() % 3];
  problem.output_dtype = DType::f32;
  problem.mask = random() % 2 ? Mask::causal : Mask::none;
  problem.scale = default_scale(problem.head_dim);
  if (random() % 4 == 0) {
    problem.queries_before = pick(0, longest);
    problem.queries_after = pick(0, problem.key_length);
  }
  return problem;
}

}  // namespace stream_cqsa::testing
