#include "engine/buffer.hpp"

#include <fmt/format.h>
#include <sys/mman.h>

#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

HostBuffer::HostBuffer(std::int64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* memory = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error(fmt::format("host memory: {} cannot be allocated; give a smaller --host-memory",
                            format_bytes(bytes)));
  }
  data_ = static_cast<std::byte*>(memory);
}

HostBuffer::~HostBuffer() {
  if (data_) munmap(data_, static_cast<std::size_t>(bytes_));
}

}  // namespace stream_cqsa
