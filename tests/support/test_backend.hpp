// The backend that the engine's tests run on: the CPU's, or, built with STREAM_CQSA_TEST_CUDA, that
// of the first CUDA device.
#pragma once

#include <cstdint>
#include <memory>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/dtype.hpp"

#if defined(STREAM_CQSA_TEST_CUDA)
#include "cuda/needs_device.hpp"
#include "stream_cqsa/cuda_backend.hpp"
#endif

namespace stream_cqsa::testing {

#if defined(STREAM_CQSA_TEST_CUDA)

inline const NeedsDevice needs_device;

inline std::unique_ptr<Backend> make_test_backend(int) { return make_cuda_backend({}); }

/// Head dimensions that the backend takes are multiples of this.
inline constexpr std::int64_t test_dim_step = 8;

/// What errors may add up to where |v| <= 2: the weights are rounded to the input's type.
inline double test_tolerance(DType dtype) {
  return dtype == DType::f16 ? 2e-3 : dtype == DType::bf16 ? 1.6e-2 : 2e-5;
}

#else

inline std::unique_ptr<Backend> make_test_backend(int threads) {
  return make_cpu_backend({threads});
}
inline constexpr std::int64_t test_dim_step = 1;
inline double test_tolerance(DType) { return 2e-5; }

#endif

}  // namespace stream_cqsa::testing
