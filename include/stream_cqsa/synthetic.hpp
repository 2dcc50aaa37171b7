// Synthetic tensors: any element of any tensor from a counter-based generator, with no storage.
#pragma once

#include <cstdint>
#include <memory>

#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// Element `index` (64-bit, row-major in [batch][token][head][dim] whatever the layout) of the
/// tensor numbered `stream` (0 query, 1 key, 2 value) under `seed`: approximately standard normal,
/// the same on every machine, a multiple of 2^-10 below 8 in magnitude before rounding to the
/// dtype.
float synthetic_element(std::uint64_t seed, std::uint32_t stream, std::uint64_t index);

/// The tensor of those elements rounded to the storage type of desc.dtype.
std::unique_ptr<TensorSource> make_synthetic_source(TensorDesc desc, std::uint64_t seed,
                                                    std::uint32_t stream);

}  // namespace stream_cqsa
