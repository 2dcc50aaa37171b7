// CUDA devices, and the backend that computes on one.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stream_cqsa/backend.hpp"

namespace stream_cqsa {

struct CudaDevice {
  std::string name;
  std::string id;            ///< of its own in the world
  int major = 0, minor = 0;  ///< compute capability
  int multiprocessors = 0;
  std::int64_t memory = 0;  ///< bytes
};

/// The devices that this process may use, in CUDA's order. Empty where there is none, no driver, or
/// the library was built without CUDA.
std::vector<CudaDevice> cuda_devices();

/// The library was built with CUDA, and a driver is installed.
bool has_cuda_driver();

/// Why cuda_devices() is empty, for messages; empty itself where it is not.
std::string why_no_cuda_devices();

/// Bytes of the device's memory that nobody has allocated, beside CUDA's own for this process.
/// Starts CUDA on the device. Throws Error when that fails.
std::int64_t cuda_free_memory(int device);

/// The name of the kernel that 16-bit inputs run on, of a device with compute capability 8.0 or
/// later. Throws Error when the device cannot be asked.
std::string cuda_kernel(int device);

struct CudaOptions {
  int device = 0;
};

/// Why the CUDA backend cannot be made, or not for `problem`; empty where it can: there is no such
/// device, it is older than compute capability 8.0, the kernels lack the head dimension.
std::string cuda_obstacle(const CudaOptions& options);
std::string cuda_obstacle(const CudaOptions& options, const Problem& problem);

/// Throws InputError where there is an obstacle; traits() does where there is one for its problem.
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options);

}  // namespace stream_cqsa
