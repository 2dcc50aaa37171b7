#include <fmt/format.h>

#include "cuda/attention.hpp"
#include "cuda/check.hpp"
#include "cuda/handles.hpp"
#include "stream_cqsa/cuda_backend.hpp"

namespace stream_cqsa {
namespace {

// Any failure leaves 0 devices. The runtime does not keep it: nobody else needs to know.
cudaError_t count_devices(int& count) {
  count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
  return status;
}

std::string id_of(const cudaDeviceProp& properties) {
  std::string id;
  for (const char byte : properties.uuid.bytes)
    id += fmt::format("{:02x}", static_cast<unsigned char>(byte));
  return id;
}

}  // namespace

std::vector<CudaDevice> cuda_devices() {
  int count = 0;
  count_devices(count);
  std::vector<CudaDevice> devices;
  for (int number = 0; number < count; ++number) {
    cudaDeviceProp properties{};
    STREAM_CQSA_CUDA_CHECK(cudaGetDeviceProperties(&properties, number));
    devices.push_back({properties.name, id_of(properties), properties.major, properties.minor,
                       properties.multiProcessorCount,
                       static_cast<std::int64_t>(properties.totalGlobalMem)});
  }
  return devices;
}

bool has_cuda_driver() {
  int version = 0;
  const bool asked = cudaDriverGetVersion(&version) == cudaSuccess;
  if (!asked) static_cast<void>(cudaGetLastError());
  return asked && version > 0;
}

std::string why_no_cuda_devices() {
  int count = 0;
  const cudaError_t status = count_devices(count);
  if (status == cudaSuccess && count > 0) return "";
  // Without a driver CUDA calls the driver too old.
  if (!has_cuda_driver()) return "no CUDA driver is installed";
  if (status == cudaSuccess || status == cudaErrorNoDevice) return "no CUDA device is visible";
  return fmt::format("CUDA devices cannot be counted: {}", cudaGetErrorString(status));
}

std::string cuda_obstacle(const CudaOptions& options) {
  const auto devices = cuda_devices();
  const auto count = static_cast<int>(devices.size());
  if (count == 0) return why_no_cuda_devices();
  if (options.device < 0 || options.device >= count) {
    return fmt::format("CUDA device {}: this process sees {}, numbered from 0", options.device,
                       count);
  }
  const CudaDevice& device = devices[static_cast<std::size_t>(options.device)];
  if (device.major >= 8) return "";
  return fmt::format("CUDA device {} ({}): compute capability {}.{}, and 8.0 is needed",
                     options.device, device.name, device.major, device.minor);
}

std::string cuda_obstacle(const CudaOptions& options, const Problem& problem) {
  if (const std::string obstacle = cuda_obstacle(options); !obstacle.empty()) return obstacle;
  if (problem.head_dim % 8 == 0) return "";
  return fmt::format("head dimension {}: the CUDA backend takes multiples of 8", problem.head_dim);
}

std::string cuda_kernel(int device) {
  cuda::use_device(device);
  return std::string(cuda::attention_kernel(DType::f16, 64));  // the same for every dimension
}

std::int64_t cuda_free_memory(int device) {
  cuda::use_device(device);
  std::size_t free = 0, total = 0;
  STREAM_CQSA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return static_cast<std::int64_t>(free);
}

}  // namespace stream_cqsa
