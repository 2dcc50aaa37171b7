// Tests of the device are skipped where there is none.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "stream_cqsa/cuda_backend.hpp"

namespace stream_cqsa::testing {

/// A global fixture: where a CUDA device is `needed` and there is none the process ends with the
/// code that CTest counts as skipped.
struct NeedsDevice {
  static constexpr int skipped = 77;

  explicit NeedsDevice(bool needed = true) {
    if (!needed || !cuda_devices().empty()) return;
    std::fprintf(stderr, "%s: skipped\n", why_no_cuda_devices().c_str());
    std::_Exit(skipped);
  }
};

}  // namespace stream_cqsa::testing
