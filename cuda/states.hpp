// Merging and finishing softmax states on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "stream_cqsa/dtype.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa::cuda {

/// into = merge(into, from), row by row: the bits of stream_cqsa::merge(), but that a NaN's sign
/// and payload are the device's. All device memory.
void launch_merge(const SoftmaxStates& into, const SoftmaxStates& from, cudaStream_t stream);

/// stream_cqsa::finalise() on the device, with its bits: O = acc / l in `type` into `output`
/// [row][dim], the first `keyless_rows` rows as O = 0. m and l end as they are: lse is the host's.
/// A NaN is written as the positive quiet NaN without payload. The states are not read, and may be
/// null, where every row is keyless.
/// Adds the NaN and infinite values written to `counts` (nan, infinite; device memory).
void launch_finalise(const SoftmaxStates& states, std::int64_t keyless_rows, DType type,
                     std::byte* output, unsigned long long* counts, cudaStream_t stream);

}  // namespace stream_cqsa::cuda
