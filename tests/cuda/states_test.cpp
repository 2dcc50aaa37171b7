// Merging and finishing states on the device against the host's.
#define BOOST_TEST_MODULE cuda_states
#include "cuda/states.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cuda/check.hpp"
#include "cuda/handles.hpp"
#include "support/needs_device.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_TEST_GLOBAL_FIXTURE(NeedsDevice);

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr std::array<std::int64_t, 15> dims = {1,  2,  3,   4,   5,   8,   24, 40,
                                               64, 96, 100, 128, 200, 255, 256};
constexpr std::array<std::int64_t, 4> row_counts = {1, 7, 300, 1237};
constexpr std::array output_types = {DType::f16, DType::bf16, DType::f32, DType::f64};

// States in host memory, with `offset` floats before them.
struct HostStates {
  std::vector<std::byte> memory;
  std::int64_t rows, dim, offset;

  HostStates(std::int64_t rows_, std::int64_t dim_, std::int64_t offset_)
      : memory(static_cast<std::size_t>(softmax_state_bytes(rows_, dim_) + 4 * offset_)),
        rows(rows_),
        dim(dim_),
        offset(offset_) {}
  SoftmaxStates view() { return view_at(memory.data()); }
  SoftmaxStates view_at(std::byte* base) const {
    return softmax_states_at(base + 4 * offset, rows, dim);
  }
};

cuda::DeviceMemory to_device(const std::vector<std::byte>& host) {
  cuda::DeviceMemory device(static_cast<std::int64_t>(host.size()));
  STREAM_CQSA_CUDA_CHECK(
      cudaMemcpy(device.data(), host.data(), host.size(), cudaMemcpyHostToDevice));
  // It may still be on its way, and our streams do not wait for the default one.
  STREAM_CQSA_CUDA_CHECK(cudaDeviceSynchronize());
  return device;
}

std::vector<std::byte> to_host(const cuda::DeviceMemory& device) {
  std::vector<std::byte> host(static_cast<std::size_t>(device.bytes()));
  STREAM_CQSA_CUDA_CHECK(
      cudaMemcpy(host.data(), device.data(), host.size(), cudaMemcpyDeviceToHost));
  return host;
}

float any_float(std::mt19937_64& random) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(random()));
}

float special(std::mt19937_64& random) {
  constexpr std::array values = {0.0f,  -0.0f,  infinity, -infinity, NAN,  -NAN,
                                 1e38f, -1e38f, 1e-40f,   126.0f,    1.0f, 65520.0f};
  return values[random() % values.size()];
}

void empty_row(const SoftmaxStates& states, std::int64_t row) {
  states.m[row] = -infinity;
  states.l[row] = 0;
  std::fill_n(states.acc + row * states.dim, states.dim, 0.0f);
}

// Usual rows, empty ones, rows with special values and rows of random bits.
void fill_random(const SoftmaxStates& states, std::mt19937_64& random) {
  const float spread = std::array{1.0f, 60.0f, 1e4f}[random() % 3];
  std::uniform_real_distribution<float> score(-spread, spread);
  std::uniform_real_distribution<float> sum(1.0f, 1000.0f);
  std::normal_distribution<float> value;
  for (std::int64_t row = 0; row < states.rows; ++row) {
    float* acc = states.acc + row * states.dim;
    const auto draw = random() % 12;
    const int power = static_cast<int>(random() % 80) - 40;
    states.m[row] = score(random);
    states.l[row] = draw == 0 ? 1.0f : sum(random);
    for (std::int64_t i = 0; i < states.dim; ++i) {
      acc[i] = draw == 1 ? any_float(random) : std::ldexp(value(random), draw < 8 ? 0 : power);
    }
    if (draw == 2) empty_row(states, row);
    if (draw == 3) states.m[row] = special(random);
    if (draw == 4) states.l[row] = special(random);
    if (draw == 5) acc[random() % static_cast<std::uint64_t>(states.dim)] = special(random);
    if (draw == 6) states.m[row] = std::round(states.m[row]);
  }
}

// The same bits, or both NaN: which NaN an operation gives depends on the processor.
bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) ||
         std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

bool same_floats(const std::vector<std::byte>& a, const std::vector<std::byte>& b) {
  for (std::size_t at = 0; at < a.size(); at += sizeof(float)) {
    float x = 0, y = 0;
    std::memcpy(&x, a.data() + at, sizeof x);
    std::memcpy(&y, b.data() + at, sizeof y);
    if (!same(x, y)) return false;
  }
  return true;
}

// An element of an output as bits, every NaN as one.
std::uint64_t canonical_bits(DType type, const std::byte* element) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, element, static_cast<std::size_t>(size_of(type)));
  const std::uint64_t infinite = type == DType::f16    ? 0x7c00
                                 : type == DType::bf16 ? 0x7f80
                                 : type == DType::f32  ? 0x7f800000
                                                       : 0x7ff0000000000000;
  const std::uint64_t magnitude = bits & ~(1ull << (8 * size_of(type) - 1));
  return magnitude > infinite ? ~0ull : bits;
}

bool same_output(DType type, const std::vector<std::byte>& a, const std::vector<std::byte>& b) {
  for (std::size_t at = 0; at < a.size(); at += static_cast<std::size_t>(size_of(type))) {
    if (canonical_bits(type, a.data() + at) != canonical_bits(type, b.data() + at)) return false;
  }
  return true;
}

struct Finalised {
  std::vector<std::byte> output;
  NonFinite count;
};

// `skip` bytes of the output's memory lie before it, and some behind it; both must stay.
Finalised finalise_on_device(const HostStates& host, std::int64_t keyless_rows, DType type,
                             std::int64_t skip) {
  constexpr std::int64_t behind = 64;
  const std::int64_t bytes = host.rows * host.dim * size_of(type);
  const std::vector<std::byte> poison(static_cast<std::size_t>(skip + bytes + behind),
                                      std::byte{0xab});
  const cuda::DeviceMemory output = to_device(poison);
  const cuda::DeviceMemory counts = to_device(std::vector<std::byte>(16));
  const cuda::DeviceMemory memory = to_device(host.memory);
  const cuda::Stream stream;
  // As on the host, no state is read where all rows are keyless.
  const SoftmaxStates states = keyless_rows < host.rows
                                   ? host.view_at(memory.data())
                                   : SoftmaxStates{nullptr, nullptr, nullptr, host.rows, host.dim};
  cuda::launch_finalise(states, keyless_rows, type, output.data() + skip,
                        reinterpret_cast<unsigned long long*>(counts.data()), stream.get());
  STREAM_CQSA_CUDA_CHECK(cudaStreamSynchronize(stream.get()));
  const std::vector<std::byte> all = to_host(output);
  const bool stayed = std::equal(all.begin(), all.begin() + skip, poison.begin()) &&
                      std::equal(all.end() - behind, all.end(), poison.begin());
  BOOST_TEST(stayed);
  std::array<std::uint64_t, 2> counted{};
  std::memcpy(counted.data(), to_host(counts).data(), sizeof counted);
  return {{all.begin() + skip, all.end() - behind},
          {static_cast<std::int64_t>(counted[0]), static_cast<std::int64_t>(counted[1])}};
}

}  // namespace

BOOST_AUTO_TEST_CASE(merge_gives_the_bits_of_the_host) {
  std::uint64_t seed = 0;
  for (const std::int64_t dim : dims) {
    for (const std::int64_t rows : row_counts) {
      for (const std::int64_t offset : {0, 1}) {
        std::mt19937_64 random(++seed);
        HostStates into(rows, dim, offset), from(rows, dim, 0);
        fill_random(into.view(), random);
        fill_random(from.view(), random);
        const cuda::DeviceMemory device = to_device(into.memory);
        const cuda::DeviceMemory other = to_device(from.memory);
        const cuda::Stream stream;
        cuda::launch_merge(into.view_at(device.data()), from.view_at(other.data()), stream.get());
        STREAM_CQSA_CUDA_CHECK(cudaStreamSynchronize(stream.get()));
        merge(into.view(), from.view());
        BOOST_TEST(same_floats(to_host(device), into.memory),
                   fmt::format("{} rows, dim {}, offset {}, seed {}", rows, dim, offset, seed));
        BOOST_TEST((to_host(other) == from.memory));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(merging_an_empty_state_changes_nothing) {
  std::mt19937_64 random(77);
  HostStates states(500, 64, 0), empty(500, 64, 0);
  std::normal_distribution<float> value;
  for (std::int64_t row = 0; row < 500; ++row) {
    empty_row(empty.view(), row);
    empty_row(states.view(), row);
    if (row % 5 == 0) continue;
    states.view().m[row] = value(random);
    states.view().l[row] = 1 + std::abs(value(random));
    std::generate_n(states.view().acc + row * 64, 64, [&] { return value(random); });
  }
  const cuda::DeviceMemory device = to_device(states.memory);
  const cuda::DeviceMemory other = to_device(empty.memory);
  cuda::launch_merge(states.view_at(device.data()), empty.view_at(other.data()), nullptr);
  BOOST_TEST(same_floats(to_host(device), states.memory));
}

BOOST_AUTO_TEST_CASE(finalise_gives_the_bits_of_the_host) {
  std::uint64_t seed = 1000;
  for (const DType type : output_types) {
    for (const std::int64_t dim : dims) {
      for (const std::int64_t rows : row_counts) {
        std::mt19937_64 random(++seed);
        HostStates states(rows, dim, 0);
        fill_random(states.view(), random);
        for (const std::int64_t keyless : {std::int64_t{0}, rows / 3, rows}) {
          for (const std::int64_t skip : {std::int64_t{0}, size_of(type)}) {
            const Finalised device = finalise_on_device(states, keyless, type, skip);
            Finalised host{std::vector<std::byte>(device.output.size()), {}};
            host.count = finalise(states.view(), 1, keyless, type, host.output.data(), nullptr);
            const std::string what = fmt::format("{}, {} rows, dim {}, {} keyless, seed {}",
                                                 name_of(type), rows, dim, keyless, seed);
            BOOST_TEST(same_output(type, device.output, host.output), what);
            BOOST_TEST((device.count == host.count), what);
          }
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(finalise_rounds_every_fp16_and_bf16_as_the_host) {
  // l = 1: the quotients are the numbers themselves, every 769th float.
  constexpr std::int64_t dim = 256;
  constexpr std::uint64_t step = 769;
  constexpr std::int64_t rows = (1ll << 32) / static_cast<std::int64_t>(step) / dim;
  HostStates states(rows, dim, 0);
  const SoftmaxStates view = states.view();
  for (std::int64_t row = 0; row < rows; ++row) view.l[row] = 1;
  for (std::int64_t i = 0; i < rows * dim; ++i) {
    view.acc[i] =
        std::bit_cast<float>(static_cast<std::uint32_t>(i) * static_cast<std::uint32_t>(step));
  }
  for (const DType type : {DType::f16, DType::bf16}) {
    const Finalised device = finalise_on_device(states, 0, type, 0);
    std::vector<std::byte> host(device.output.size());
    const NonFinite count = finalise(view, 1, 0, type, host.data(), nullptr);
    BOOST_TEST(same_output(type, device.output, host), name_of(type));
    BOOST_TEST((device.count == count));
  }
}

BOOST_AUTO_TEST_CASE(nothing_to_do_is_no_launch) {
  const SoftmaxStates nothing{nullptr, nullptr, nullptr, 0, 64};
  cuda::launch_merge(nothing, nothing, nullptr);
  cuda::launch_finalise(nothing, 0, DType::f16, nullptr, nullptr, nullptr);
  STREAM_CQSA_CUDA_CHECK(cudaDeviceSynchronize());
}
