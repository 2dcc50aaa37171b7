// Owners of CUDA handles, and errors as exceptions.
#define BOOST_TEST_MODULE cuda_handles
#include "cuda/handles.hpp"

#include <boost/test/unit_test.hpp>
#include <string>
#include <vector>

#include "cuda/check.hpp"
#include "support/needs_device.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_TEST_GLOBAL_FIXTURE(NeedsDevice);

BOOST_AUTO_TEST_CASE(an_allocation_that_does_not_fit_says_so) {
  std::string message;
  try {
    const cuda::DeviceMemory memory(std::int64_t{1} << 50);
  } catch (const cuda::CudaError& error) {
    message = error.what();
    BOOST_TEST(error.code() == cudaErrorMemoryAllocation);
  }
  BOOST_TEST(
      message.starts_with("cudaMalloc(1024.00 TiB) failed: out of memory (cuda/handles.cpp:"),
      message);
  // The error is not met again by the next check.
  BOOST_TEST(cudaGetLastError() == cudaSuccess);
}

BOOST_AUTO_TEST_CASE(handles_move) {
  cuda::DeviceMemory memory(1024);
  std::byte* data = memory.data();
  cuda::DeviceMemory moved = std::move(memory);
  BOOST_TEST(moved.data() == data);
  moved = cuda::DeviceMemory(2048);
  BOOST_TEST(moved.bytes() == 2048);
  cuda::Stream stream;
  const cudaStream_t handle = stream.get();
  const cuda::Stream other = std::move(stream);
  BOOST_TEST(other.get() == handle);
  STREAM_CQSA_CUDA_CHECK(cudaStreamSynchronize(other.get()));
}

BOOST_AUTO_TEST_CASE(events_measure_time) {
  const cuda::Stream stream;
  const cuda::Event first, second;
  STREAM_CQSA_CUDA_CHECK(cudaEventRecord(first.get(), stream.get()));
  STREAM_CQSA_CUDA_CHECK(cudaEventRecord(second.get(), stream.get()));
  STREAM_CQSA_CUDA_CHECK(cudaEventSynchronize(second.get()));
  float milliseconds = -1;
  STREAM_CQSA_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, first.get(), second.get()));
  BOOST_TEST(milliseconds >= 0);
}

BOOST_AUTO_TEST_CASE(host_memory_is_pinned_while_its_owner_lives) {
  std::vector<std::byte> memory(1 << 20);
  const auto is_pinned = [&] {
    cudaPointerAttributes attributes{};
    STREAM_CQSA_CUDA_CHECK(cudaPointerGetAttributes(&attributes, memory.data() + 4096));
    return attributes.type == cudaMemoryTypeHost;
  };
  BOOST_TEST(!is_pinned());
  {
    const cuda::Pinned pinned{std::span(memory)};
    BOOST_TEST(is_pinned());
    BOOST_CHECK_THROW(cuda::Pinned{std::span(memory)}, cuda::CudaError);
  }
  BOOST_TEST(!is_pinned());
  const cuda::Pinned nothing{std::span<std::byte>()};
}

BOOST_AUTO_TEST_CASE(a_device_that_does_not_exist) {
  BOOST_CHECK_THROW(cuda::use_device(100000), cuda::CudaError);
  cuda::use_device(0);
}
