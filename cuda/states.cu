// Compiled with -fmad=false: a product and a sum become one fma only where fmaf is written, as on
// the host.
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/check.hpp"
#include "cuda/states.hpp"

namespace stream_cqsa::cuda {
namespace {

constexpr std::int64_t block_threads = 256;
constexpr std::int64_t max_blocks = 16384;  // enough for every device; beyond it blocks loop

// `width` elements that are loaded and stored together.
template <class T, int width>
struct alignas(sizeof(T) * width <= 16 ? sizeof(T) * width : 16) Pack {
  T at[width];
};

// A block is rows of threads: x counts the packs of a state row, y the rows that a block takes at
// a time. Consecutive threads touch consecutive memory and nothing is divided.
struct RowGrid {
  dim3 threads;
  unsigned blocks;

  RowGrid(std::int64_t rows, std::int64_t packs) {
    const std::int64_t x = std::clamp<std::int64_t>(packs, 1, block_threads);
    const std::int64_t y = block_threads / x;
    threads = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
    blocks = static_cast<unsigned>(std::min((rows + y - 1) / y, max_blocks));
  }
};

__device__ std::int64_t first_row_of_block() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.y;
}

__device__ std::int64_t rows_of_grid() { return static_cast<std::int64_t>(gridDim.x) * blockDim.y; }

template <int width>
__global__ void merge_kernel(SoftmaxStates into, SoftmaxStates from) {
  using Floats = Pack<float, width>;
  // The condition is the block's, not the thread's: every thread reaches the barrier.
  for (std::int64_t first = first_row_of_block(); first < into.rows; first += rows_of_grid()) {
    const std::int64_t row = first + threadIdx.y;
    const bool live = row < into.rows;
    const MergeWeights weights =
        live ? merge_weights(into.m[row], from.m[row]) : MergeWeights{0, 0, 0};
    __syncthreads();  // all threads of a row have read its m before one replaces it
    if (!live) continue;
    if (threadIdx.x == 0) {
      into.m[row] = weights.max;
      into.l[row] = fmaf(weights.first, into.l[row], __fmul_rn(weights.second, from.l[row]));
    }
    auto* acc = reinterpret_cast<Floats*>(into.acc + row * into.dim);
    const auto* other = reinterpret_cast<const Floats*>(from.acc + row * into.dim);
    for (std::int64_t pack = threadIdx.x; pack < into.dim / width; pack += blockDim.x) {
      Floats sum = acc[pack];
      const Floats added = other[pack];
#pragma unroll
      for (int i = 0; i < width; ++i) {
        sum.at[i] = fmaf(weights.first, sum.at[i], __fmul_rn(weights.second, added.at[i]));
      }
      acc[pack] = sum;
    }
  }
}

// Each output type divides and says what the quotient's bits are. As the host does: fp32 division,
// fp64 for fp64 output; NaN is written as the positive quiet NaN without payload.
struct ToF32 {
  using Stored = std::uint32_t;
  static constexpr Stored exponent_bits = 0x7f800000;
  static __device__ Stored divide(float acc, float l) {
    const float quotient = __fdiv_rn(acc, l);
    return isnan(quotient) ? 0x7fc00000 : __float_as_uint(quotient);
  }
};

struct ToF64 {
  using Stored = std::uint64_t;
  static constexpr Stored exponent_bits = 0x7ff0000000000000;
  static __device__ Stored divide(float acc, float l) {
    const double quotient = __ddiv_rn(acc, l);
    return isnan(quotient) ? 0x7ff8000000000000
                           : static_cast<Stored>(__double_as_longlong(quotient));
  }
};

struct ToBf16 {
  using Stored = std::uint16_t;
  static constexpr Stored exponent_bits = 0x7f80;
  static __device__ Stored divide(float acc, float l) {
    const float quotient = __fdiv_rn(acc, l);
    if (isnan(quotient)) return 0x7fc0;
    const std::uint32_t bits = __float_as_uint(quotient);
    return static_cast<Stored>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

struct ToF16 {
  using Stored = std::uint16_t;
  static constexpr Stored exponent_bits = 0x7c00;
  static __device__ Stored divide(float acc, float l) {
    const float quotient = __fdiv_rn(acc, l);
    return isnan(quotient) ? 0x7e00 : __half_as_ushort(__float2half_rn(quotient));
  }
};

// Adds one number per thread of the block to the two counts in device memory.
__device__ void add_counts(unsigned nan, unsigned infinite, unsigned long long* counts) {
  __shared__ unsigned long long sums[2];
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (thread < 2) sums[thread] = 0;
  __syncthreads();
  if (nan != 0) atomicAdd(&sums[0], static_cast<unsigned long long>(nan));
  if (infinite != 0) atomicAdd(&sums[1], static_cast<unsigned long long>(infinite));
  __syncthreads();
  if (thread < 2 && sums[thread] != 0) atomicAdd(&counts[thread], sums[thread]);
}

template <class To, int width>
__global__ void finalise_kernel(SoftmaxStates states, std::int64_t keyless_rows,
                                typename To::Stored* output, unsigned long long* counts) {
  using Stored = typename To::Stored;
  unsigned nan = 0;  // a thread writes fewer than 2^32 elements
  unsigned infinite = 0;
  for (std::int64_t row = first_row_of_block() + threadIdx.y; row < states.rows;
       row += rows_of_grid()) {
    const bool keyless = row < keyless_rows;
    const float l = keyless ? 1.0f : states.l[row];
    const auto* acc = reinterpret_cast<const Pack<float, width>*>(states.acc + row * states.dim);
    auto* to = reinterpret_cast<Pack<Stored, width>*>(output + row * states.dim);
    for (std::int64_t pack = threadIdx.x; pack < states.dim / width; pack += blockDim.x) {
      const Pack<float, width> from = keyless ? Pack<float, width>{} : acc[pack];
      Pack<Stored, width> bits;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        bits.at[i] = To::divide(from.at[i], l);
        const bool special = (bits.at[i] & To::exponent_bits) == To::exponent_bits;
        const bool exact = (bits.at[i] & (To::exponent_bits & -To::exponent_bits) - 1) == 0;
        infinite += special && exact;
        nan += special && !exact;
      }
      to[pack] = bits;
    }
  }
  add_counts(nan, infinite, counts);
}

// True when rows of `dim` elements that begin at these addresses split into packs of 16 bytes.
bool splits_into_packs(std::int64_t dim, const void* first, const void* second) {
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return dim % 4 == 0 && aligned(first) && aligned(second);
}

template <class To, int width>
void launch_finalise_packs(const SoftmaxStates& states, std::int64_t keyless_rows,
                           std::byte* output, unsigned long long* counts, cudaStream_t stream) {
  const RowGrid grid(states.rows, states.dim / width);
  finalise_kernel<To, width><<<grid.blocks, grid.threads, 0, stream>>>(
      states, keyless_rows, reinterpret_cast<typename To::Stored*>(output), counts);
  STREAM_CQSA_CUDA_CHECK(cudaGetLastError());
}

template <class To>
void launch_finalise_as(const SoftmaxStates& states, std::int64_t keyless_rows, std::byte* output,
                        unsigned long long* counts, cudaStream_t stream) {
  if (splits_into_packs(states.dim, states.acc, output)) {
    launch_finalise_packs<To, 4>(states, keyless_rows, output, counts, stream);
  } else {
    launch_finalise_packs<To, 1>(states, keyless_rows, output, counts, stream);
  }
}

template <int width>
void launch_merge_packs(const SoftmaxStates& into, const SoftmaxStates& from, cudaStream_t stream) {
  const RowGrid grid(into.rows, into.dim / width);
  merge_kernel<width><<<grid.blocks, grid.threads, 0, stream>>>(into, from);
  STREAM_CQSA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_merge(const SoftmaxStates& into, const SoftmaxStates& from, cudaStream_t stream) {
  if (into.rows == 0) return;
  if (splits_into_packs(into.dim, into.acc, from.acc)) {
    launch_merge_packs<4>(into, from, stream);
  } else {
    launch_merge_packs<1>(into, from, stream);
  }
}

void launch_finalise(const SoftmaxStates& states, std::int64_t keyless_rows, DType type,
                     std::byte* output, unsigned long long* counts, cudaStream_t stream) {
  if (states.rows == 0) return;
  switch (type) {
    case DType::f16:
      return launch_finalise_as<ToF16>(states, keyless_rows, output, counts, stream);
    case DType::bf16:
      return launch_finalise_as<ToBf16>(states, keyless_rows, output, counts, stream);
    case DType::f32:
      return launch_finalise_as<ToF32>(states, keyless_rows, output, counts, stream);
    case DType::f64:
      return launch_finalise_as<ToF64>(states, keyless_rows, output, counts, stream);
  }
}

}  // namespace stream_cqsa::cuda
