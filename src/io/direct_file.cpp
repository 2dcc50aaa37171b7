#include "io/direct_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "io/partial_file.hpp"
#include "io/stored_tensor.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

// Where the system does not say: the largest logical block of a disk.
constexpr std::size_t page = 4096;

std::size_t round_up_to(std::size_t value, std::size_t step) {
  return (value + step - 1) / step * step;
}

std::string reason_of(int number) { return std::generic_category().message(number); }

bool is_refusal(int number) { return number == EINVAL || number == EOPNOTSUPP; }

/// What direct reads of an open file must be aligned to. Throws Error where there are none.
std::size_t alignment_of(int descriptor) {
  std::size_t alignment = page;
#ifdef STATX_DIOALIGN
  struct statx status {};
  if (::statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
      (status.stx_mask & STATX_DIOALIGN) != 0) {
    if (status.stx_dio_offset_align == 0) throw Error(reason_of(EOPNOTSUPP));
    alignment =
        std::max<std::size_t>({page, status.stx_dio_offset_align, status.stx_dio_mem_align});
  }
#endif
  const bool power = (alignment & (alignment - 1)) == 0;
  if (power && alignment <= DirectReads::largest_alignment) return alignment;
  throw Error(fmt::format("an alignment of {} bytes", alignment));
}

}  // namespace

DirectReads open_direct_reads(const std::filesystem::path& path) {
  int number = -1;
  do {
    number = ::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  } while (number < 0 && errno == EINTR);
  if (number < 0) throw Error(reason_of(errno));
  const auto descriptor = std::make_shared<Descriptor>(number);
  return {alignment_of(number), [descriptor](std::span<std::byte> into, std::uint64_t offset) {
            return ::pread(descriptor->number(), into.data(), into.size(),
                           static_cast<off_t>(offset));
          }};
}

void DirectBuffers::refuse(const std::string& name, const std::string& reason) {
  std::call_once(said_, [&] {
    refused_(fmt::format("{} cannot be read directly ({}): reading through the page cache", name,
                         reason));
  });
}

void DirectFile::read_at(std::uint64_t offset, std::span<std::byte> into) {
  while (!into.empty() && !refused_) {
    const std::size_t got = read_some(offset, into);
    if (got == 0) break;
    offset += got;
    into = into.subspan(got);
  }
  if (!into.empty()) usual_->read_at(offset, into);
}

// One request for the first of those bytes: how many of them it gave. None where the file ends or
// refuses.
std::size_t DirectFile::read_some(std::uint64_t offset, std::span<std::byte> into) {
  const std::size_t alignment = reads_.alignment;
  const auto skipped = static_cast<std::size_t>(offset % alignment);
  const std::size_t wanted = round_up_to(skipped + into.size(), alignment);
  const std::size_t most = (DirectBuffers::bytes - alignment) / alignment * alignment;
  const std::size_t requests = (wanted + most - 1) / most;
  const std::size_t bytes = round_up_to((wanted + requests - 1) / requests, alignment);

  BufferPool::Lease lease = buffers_->pool().take();
  const std::span<std::byte> whole = lease.first(DirectBuffers::bytes);
  const auto address = reinterpret_cast<std::uintptr_t>(whole.data());
  const std::span<std::byte> buffer =
      whole.subspan(round_up_to(address, alignment) - address, bytes);
  ssize_t got = 0;
  do {
    got = reads_.read(buffer, offset - skipped);
  } while (got < 0 && errno == EINTR);
  if (got < 0) {
    const int reason = errno;
    if (!is_refusal(reason)) {
      throw Error(
          fmt::format("{} cannot be read at byte {}: {}", name_, offset, reason_of(reason)));
    }
    refused_ = true;
    buffers_->refuse(name_, reason_of(reason));
    return 0;
  }
  if (static_cast<std::size_t>(got) <= skipped) return 0;
  const std::size_t given = std::min(static_cast<std::size_t>(got) - skipped, into.size());
  std::memcpy(into.data(), buffer.data() + skipped, given);
  return given;
}

FileOpener direct_opener(FileOpener usual, std::function<void(const std::string&)> refused) {
  const auto buffers = std::make_shared<DirectBuffers>(std::move(refused));
  return [buffers, usual = std::move(usual)](const std::filesystem::path& path,
                                             FileMode mode) -> std::unique_ptr<File> {
    auto file = usual(path, mode);
    if (mode != FileMode::read) return file;
    const std::string name = printable(path.string());
    DirectReads reads;
    try {
      reads = open_direct_reads(path);
    } catch (const Error& error) {
      buffers->refuse(name, error.what());
      return file;
    }
    return std::make_unique<DirectFile>(std::move(file), name, std::move(reads), buffers);
  };
}

}  // namespace stream_cqsa
