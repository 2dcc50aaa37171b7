#include "cuda/check.hpp"
#include "cuda/handles.hpp"
#include "stream_cqsa/cuda_backend.hpp"

namespace stream_cqsa {

std::vector<CudaDevice> cuda_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no device or no driver: nobody else needs to know
    return {};
  }
  std::vector<CudaDevice> devices;
  for (int number = 0; number < count; ++number) {
    cudaDeviceProp properties{};
    STREAM_CQSA_CUDA_CHECK(cudaGetDeviceProperties(&properties, number));
    devices.push_back({properties.name, properties.major, properties.minor,
                       properties.multiProcessorCount,
                       static_cast<std::int64_t>(properties.totalGlobalMem)});
  }
  return devices;
}

std::int64_t cuda_free_memory(int device) {
  cuda::use_device(device);
  std::size_t free = 0, total = 0;
  STREAM_CQSA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return static_cast<std::int64_t>(free);
}

}  // namespace stream_cqsa
