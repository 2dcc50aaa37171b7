// What a build without CUDA has instead of the CUDA backend.
#include "stream_cqsa/cuda_backend.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

std::vector<CudaDevice> cuda_devices() { return {}; }

std::int64_t cuda_free_memory(int) { return 0; }

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions&) {
  throw InputError("this build has no CUDA backend; use --backend cpu, or build where nvcc is");
}

}  // namespace stream_cqsa
