#include "engine/buffer.hpp"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;

std::size_t round_up_to_page(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

}  // namespace

HostBuffer::HostBuffer(std::int64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  // From a huge page's boundary on, and asked to be of such pages: first touches, pinning and
  // copies between processes then take a fraction of the time.
  const std::size_t size = round_up_to_page(static_cast<std::size_t>(bytes));
  void* memory = mmap(nullptr, size + huge_page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error(fmt::format("host memory: {} cannot be allocated; give a smaller --host-memory",
                            format_bytes(bytes)));
  }
  const std::size_t before = (huge_page - reinterpret_cast<std::uintptr_t>(memory)) % huge_page;
  data_ = static_cast<std::byte*>(memory) + before;
  if (before > 0) munmap(memory, before);
  munmap(data_ + size, huge_page - before);
  madvise(data_, size, MADV_HUGEPAGE);  // where the system has none, pages are small
}

HostBuffer::~HostBuffer() {
  if (data_) munmap(data_, static_cast<std::size_t>(bytes_));
}

}  // namespace stream_cqsa
