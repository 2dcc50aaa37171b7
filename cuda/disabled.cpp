// What a build without CUDA has instead of the CUDA backend.
#include "stream_cqsa/cuda_backend.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

std::vector<CudaDevice> cuda_devices() { return {}; }

bool has_cuda_driver() { return false; }

std::string why_no_cuda_devices() { return "this build has no CUDA backend"; }

std::string cuda_obstacle(const CudaOptions&) { return why_no_cuda_devices(); }

std::string cuda_obstacle(const CudaOptions&, const Problem&) { return why_no_cuda_devices(); }

std::string cuda_kernel(int) { return ""; }

std::int64_t cuda_free_memory(int) { return 0; }

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions&) {
  throw InputError(why_no_cuda_devices() + "; use --backend cpu, or build where nvcc is");
}

}  // namespace stream_cqsa
