// The backend that the engine's tests run on: the CPU's or, where STREAM_CQSA_TEST_BACKEND is
// "cuda", that of the first CUDA device.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string_view>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/cuda_backend.hpp"
#include "stream_cqsa/dtype.hpp"
#include "support/needs_device.hpp"

namespace stream_cqsa::testing {

inline bool on_cuda() {
  const char* backend = std::getenv("STREAM_CQSA_TEST_BACKEND");
  return backend != nullptr && std::string_view(backend) == "cuda";
}

inline const NeedsDevice needs_device(on_cuda());

inline std::unique_ptr<Backend> make_test_backend(int threads) {
  return on_cuda() ? make_cuda_backend({}) : make_cpu_backend({threads});
}

/// Head dimensions that the backend takes are multiples of this.
inline std::int64_t test_dim_step() { return on_cuda() ? 8 : 1; }

/// What errors may add up to where |v| <= 2: a GPU rounds the weights to the input's type.
inline double test_tolerance(DType dtype) {
  if (!on_cuda()) return 2e-5;
  return dtype == DType::f16 ? 2e-3 : dtype == DType::bf16 ? 1.6e-2 : 2e-5;
}

}  // namespace stream_cqsa::testing
