// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa::cuda {

/// A CUDA call that failed. The message names the call, its file and line, and CUDA's own words.
class CudaError : public Error {
 public:
  CudaError(cudaError_t code, const char* call, const char* file, int line);
  cudaError_t code() const { return code_; }

 private:
  cudaError_t code_;
};

inline void check(cudaError_t code, const char* call, const char* file, int line) {
  if (code != cudaSuccess) throw CudaError(code, call, file, line);
}

}  // namespace stream_cqsa::cuda

/// Throws CudaError unless the call succeeds.
#define STREAM_CQSA_CUDA_CHECK(call) ::stream_cqsa::cuda::check((call), #call, __FILE__, __LINE__)
