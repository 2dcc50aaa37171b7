// The portable kernels with offsets beyond 2^31 elements in every tensor of one chunk. On compute
// capability 9.0 the engine runs 16-bit inputs on another kernel.
#define BOOST_TEST_MODULE cuda_large_launch
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <cstdio>

#include "attention_launch.hpp"
#include "cuda/check.hpp"
#include "cuda/handles.hpp"
#include "stream_cqsa/cuda_backend.hpp"
#include "support/needs_device.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_GLOBAL_FIXTURE(NeedsDevice);

namespace {

constexpr std::int64_t tokens = 16400;
constexpr std::int64_t heads = 2048;
constexpr std::int64_t dim = 64;
constexpr std::int64_t elements = tokens * heads * dim;
static_assert(elements > std::int64_t{1} << 31);
constexpr std::int64_t last = elements - dim;  // the last token's last head

cuda::DeviceMemory zeros(std::int64_t bytes) {
  cuda::DeviceMemory memory(bytes);
  STREAM_CQSA_CUDA_CHECK(cudaMemset(memory.data(), 0, static_cast<std::size_t>(bytes)));
  return memory;
}

// Zeros, but for the first element of the last vector.
cuda::DeviceMemory tensor(DType type, float value) {
  cuda::DeviceMemory memory = zeros(elements * size_of(type));
  const std::uint16_t small = type == DType::f16 ? f32_to_f16(value) : f32_to_bf16(value);
  const void* from = type == DType::f32 ? static_cast<const void*>(&value) : &small;
  const auto bytes = static_cast<std::size_t>(size_of(type));
  STREAM_CQSA_CUDA_CHECK(
      cudaMemcpy(memory.data() + last * size_of(type), from, bytes, cudaMemcpyHostToDevice));
  return memory;
}

float number_at(const float* array, std::int64_t index) {
  float number = 0;
  STREAM_CQSA_CUDA_CHECK(cudaMemcpy(&number, array + index, sizeof number, cudaMemcpyDeviceToHost));
  return number;
}

template <class T>
cuda::DeviceMemory on_device(const T& item) {
  cuda::DeviceMemory memory(sizeof item);
  STREAM_CQSA_CUDA_CHECK(cudaMemcpy(memory.data(), &item, sizeof item, cudaMemcpyHostToDevice));
  return memory;
}

void check_row(const cuda::QueryItem& states, std::int64_t row, double m, double l, double acc) {
  BOOST_TEST(std::abs(double{number_at(states.m, row)} - m) <= 1e-5, "m of row " << row);
  BOOST_TEST(std::abs(double{number_at(states.l, row)} - l) <= 1e-5 * l, "l of row " << row);
  BOOST_TEST(std::abs(double{number_at(states.acc, row * dim)} - acc) <= 1e-5,
             "acc of row " << row);
  BOOST_TEST(number_at(states.acc, row * dim + dim - 1) == 0.0f);
}

// All scores are 0, but 10 of the last query with the last key of the last head; V is 0, but 1 in
// that key.
void check(DType type) {
  const cuda::DeviceMemory q = tensor(type, 4), k = tensor(type, 2.5), v = tensor(type, 1);
  const cuda::DeviceMemory acc = zeros(elements * 4), sums = zeros(2 * tokens * heads * 4);
  auto* m = reinterpret_cast<float*>(sums.data());
  const cuda::QueryItem query{
      q.data(), reinterpret_cast<float*>(acc.data()), m, m + tokens * heads, 0, tokens, 0, 0, 1};
  const cuda::KeyItem key{k.data(), v.data(), 0, tokens, 0};
  const cuda::DeviceMemory queries = on_device(query), keys = on_device(key);
  const CaseKernel kernel = kernels(type, dim).front();
  const cuda::AttentionWork work{reinterpret_cast<const cuda::QueryItem*>(queries.data()),
                                 reinterpret_cast<const cuda::KeyItem*>(keys.data()),
                                 1,
                                 ceil_div(tokens, kernel.queries),
                                 heads,
                                 heads,
                                 dim,
                                 1.0f,
                                 0};
  STREAM_CQSA_CUDA_CHECK(cudaDeviceSynchronize());
  const cuda::Stream stream;
  kernel.launch(work, stream.get());
  STREAM_CQSA_CUDA_CHECK(cudaStreamSynchronize(stream.get()));
  const double others = tokens - 1;
  const std::int64_t rows = tokens * heads;
  check_row(query, rows - 1, 10, 1 + others * 0x1p-10, 1);
  check_row(query, rows - 2, 0, tokens, 0);
  check_row(query, rows - 1 - heads, 0, tokens, 1);
  check_row(query, heads - 1, 0, tokens, 1);
  check_row(query, 0, 0, tokens, 0);
}

}  // namespace

BOOST_AUTO_TEST_CASE(more_than_2_to_the_31_elements_in_every_tensor) {
  if (cuda_free_memory(0) < std::int64_t{38} << 30) {
    std::fputs("a device with 38 GiB free is needed: skipped\n", stderr);
    std::_Exit(NeedsDevice::skipped);
  }
  for (const DType type : {DType::f16, DType::bf16, DType::f32}) {
    BOOST_TEST_CONTEXT(name_of(type)) { check(type); }
  }
}
