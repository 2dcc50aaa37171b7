// A checksum of a tensor that does not depend on the order in which it is read or written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "stream_cqsa/softmax_state.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// The sum, modulo 2^64, of a 64-bit hash of every vector's bytes and place, and the NaN and
/// infinite values met. Equal for equal elements whatever the layout, the file format, the blocks
/// and their order; each vector must be added once. Detects accidents, not adversaries.
struct Fingerprint {
  std::uint64_t checksum = 0;
  std::int64_t vectors = 0;
  NonFinite non_finite;

  /// Adds a block of the tensor `desc` that lies at `rows`, of elements of type `dtype`.
  void add(const TensorDesc& desc, DType dtype, const Block& block, const StridedRows& rows);
  Fingerprint& operator+=(const Fingerprint& other) {
    checksum += other.checksum;
    vectors += other.vectors;
    non_finite += other.non_finite;
    return *this;
  }
  friend bool operator==(const Fingerprint&, const Fingerprint&) = default;
};

}  // namespace stream_cqsa
