#include "cuda/handles.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "cuda/check.hpp"
#include "stream_cqsa/bytes.hpp"

// Destructors ignore what CUDA returns: after a device error every call fails, and the error that
// matters has been thrown already.
namespace stream_cqsa::cuda {
namespace {

// A call as the error names it: with the size that was asked for.
std::string sized_call(const char* call, std::int64_t bytes) {
  return fmt::format("{}({})", call, format_bytes(bytes));
}

// Pages that are there already are registered an order of magnitude faster, and threads can share
// the work of making them.
void touch_pages(std::span<std::byte> memory) {
  constexpr std::size_t page = 4096;
  constexpr std::size_t share = std::size_t{64} << 20;
  const std::size_t most = std::max(1u, std::thread::hardware_concurrency());
  const std::size_t count = std::min(most, memory.size() / share + 1);
  const std::size_t each = memory.size() / count + 1;
  std::vector<std::jthread> threads;
  for (std::size_t first = 0; first < memory.size(); first += each) {
    const auto part = memory.subspan(first, std::min(each, memory.size() - first));
    threads.emplace_back([part] {
      for (std::size_t at = 0; at < part.size(); at += page) {
        volatile std::byte& byte = part[at];
        byte = byte;
      }
    });
  }
}

}  // namespace

Stream::Stream() {
  STREAM_CQSA_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
}

Stream::~Stream() {
  if (stream_ != nullptr) static_cast<void>(cudaStreamDestroy(stream_));
}

Event::Event() { STREAM_CQSA_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventBlockingSync)); }

Event::~Event() {
  if (event_ != nullptr) static_cast<void>(cudaEventDestroy(event_));
}

DeviceMemory::DeviceMemory(std::int64_t bytes) : bytes_(bytes) {
  void* memory = nullptr;
  const cudaError_t code = cudaMalloc(&memory, static_cast<std::size_t>(bytes));
  if (code != cudaSuccess) {
    throw CudaError(code, sized_call("cudaMalloc", bytes).c_str(), __FILE__, __LINE__);
  }
  data_ = static_cast<std::byte*>(memory);
}

DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr) static_cast<void>(cudaFree(data_));
}

Pinned::Pinned(std::span<std::byte> memory) {
  if (memory.empty()) return;
  touch_pages(memory);
  const cudaError_t code = cudaHostRegister(memory.data(), memory.size(), cudaHostRegisterDefault);
  if (code != cudaSuccess) {
    const std::string call =
        sized_call("cudaHostRegister", static_cast<std::int64_t>(memory.size()));
    throw CudaError(code, call.c_str(), __FILE__, __LINE__);
  }
  data_ = memory.data();
}

Pinned::~Pinned() {
  if (data_ != nullptr) static_cast<void>(cudaHostUnregister(data_));
}

PinnedMemory::PinnedMemory(std::int64_t bytes) : bytes_(bytes) {
  void* memory = nullptr;
  const cudaError_t code =
      cudaHostAlloc(&memory, static_cast<std::size_t>(bytes), cudaHostAllocDefault);
  if (code != cudaSuccess) {
    throw CudaError(code, sized_call("cudaHostAlloc", bytes).c_str(), __FILE__, __LINE__);
  }
  data_ = static_cast<std::byte*>(memory);
}

PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr) static_cast<void>(cudaFreeHost(data_));
}

void use_device(int device) { STREAM_CQSA_CUDA_CHECK(cudaSetDevice(device)); }

}  // namespace stream_cqsa::cuda
