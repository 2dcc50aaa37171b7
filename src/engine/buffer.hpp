// One allocation of host memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace stream_cqsa {

/// Page-aligned memory, mapped at once and touched when used. Move-only.
class HostBuffer {
 public:
  HostBuffer() = default;
  /// Throws Error when the system has no room for `bytes`.
  explicit HostBuffer(std::int64_t bytes);
  HostBuffer(HostBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  HostBuffer& operator=(HostBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~HostBuffer();

  std::byte* data() const { return data_; }
  std::int64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

}  // namespace stream_cqsa
