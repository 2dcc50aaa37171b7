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
};

/// The portable kernel of the type, with the tiles that fit this device, and with its smallest.
std::vector<CaseKernel> kernels(DType type, std::int64_t dim);

/// launch() by that kernel.
CaseStates launch(const AttentionCase& attention, const CaseKernel& kernel);

}  // namespace stream_cqsa::testing
