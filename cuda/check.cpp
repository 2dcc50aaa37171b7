#include "cuda/check.hpp"

#include <fmt/format.h>

#include <string_view>

namespace stream_cqsa::cuda {
namespace {

// The path from the repository's root on, whatever the compiler was given.
std::string_view repository_path(std::string_view path) {
  const std::size_t at = path.rfind("cuda/");
  return at == std::string_view::npos ? path : path.substr(at);
}

}  // namespace

CudaError::CudaError(cudaError_t code, const char* call, const char* file, int line)
    : Error(fmt::format("{} failed: {} ({}:{})", call, cudaGetErrorString(code),
                        repository_path(file), line)),
      code_(code) {
  // The runtime keeps the error; the check of a later launch would report it once more.
  static_cast<void>(cudaGetLastError());
}

}  // namespace stream_cqsa::cuda
