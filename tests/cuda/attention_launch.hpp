// A launch of an AttentionCase by a given kernel.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "attention_case.hpp"
#include "cuda/attention.hpp"

namespace stream_cqsa::testing {

struct CaseKernel {
  std::string name;
  std::int64_t queries;  ///< of a tile
  std::function<void(const cuda::AttentionWork&, cudaStream_t)> launch;
  bool pools = false;  ///< chunks lie in slots of pools, as the engine has them
};

/// The portable kernel of the type, with the tiles that fit this device, and with its smallest.
/// Of f16 and bf16 the last is what launch_attention() takes for slots in pools: on compute
/// capability 9.0 the Hopper kernel.
std::vector<CaseKernel> kernels(DType type, std::int64_t dim);

/// One launch by that kernel. Every chunk has a slot of its own, with NaN around it but where the
/// kernel is promised other, and the states are NaN before it. Throws Error when anything but the
/// states was written.
CaseStates launch(const AttentionCase& attention, const CaseKernel& kernel);

}  // namespace stream_cqsa::testing
