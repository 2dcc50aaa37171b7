// Tests of the device are skipped where there is none.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>

namespace stream_cqsa::testing {

/// A global fixture: without a CUDA device the process ends with the code that CTest counts as
/// skipped.
struct NeedsDevice {
  static constexpr int skipped = 77;

  NeedsDevice() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return;
    std::fputs("no CUDA device: skipped\n", stderr);
    std::_Exit(skipped);
  }
};

}  // namespace stream_cqsa::testing
