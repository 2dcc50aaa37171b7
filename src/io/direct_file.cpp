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

std::size_t round_up_to(std::size_t value, std::size_t step) {
  return (value + step - 1) / step * step;
}

std::string reason_of(int number) { return std::generic_category().message(number); }

bool is_refusal(int number) { return number == EINVAL || number == EOPNOTSUPP; }

/// What direct access to an open file must be aligned to. Throws Error where there is none.
std::size_t alignment_of(int descriptor) {
  // Where the system does not say: the largest logical block of a disk.
  std::size_t alignment = direct_block;
#ifdef STATX_DIOALIGN
  struct statx status {};
  if (::statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
      (status.stx_mask & STATX_DIOALIGN) != 0) {
    if (status.stx_dio_offset_align == 0) throw Error(reason_of(EOPNOTSUPP));
    alignment = std::max<std::size_t>(
        {direct_block, status.stx_dio_offset_align, status.stx_dio_mem_align});
  }
#endif
  const bool power = (alignment & (alignment - 1)) == 0;
  if (power && alignment <= DirectAccess::largest_alignment) return alignment;
  throw Error(fmt::format("an alignment of {} bytes", alignment));
}

}  // namespace

DirectAccess open_direct_access(const std::filesystem::path& path, FileMode mode) {
  int number = -1;
  do {
    number =
        ::open(path.c_str(), (mode == FileMode::read ? O_RDONLY : O_RDWR) | O_DIRECT | O_CLOEXEC);
  } while (number < 0 && errno == EINTR);
  if (number < 0) throw Error(reason_of(errno));
  const auto descriptor = std::make_shared<Descriptor>(number);
  DirectAccess access;
  access.alignment = alignment_of(number);
  access.read = [descriptor](std::span<std::byte> into, std::uint64_t offset) {
    return ::pread(descriptor->number(), into.data(), into.size(), static_cast<off_t>(offset));
  };
  if (mode == FileMode::read) return access;
  access.write = [descriptor](std::span<const std::byte> from, std::uint64_t offset) {
    return ::pwrite(descriptor->number(), from.data(), from.size(), static_cast<off_t>(offset));
  };
  access.sync = [descriptor] { return ::fsync(descriptor->number()); };
  return access;
}

void DirectBuffers::refuse(const std::string& name, const std::string& reason) {
  std::call_once(said_, [&] {
    refused_(
        fmt::format("{} has no direct access ({}): it goes through the page cache", name, reason));
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
  const std::size_t alignment = access_.alignment;
  const auto skipped = static_cast<std::size_t>(offset % alignment);
  const std::size_t wanted = round_up_to(skipped + into.size(), alignment);
  const std::size_t requests = (wanted + largest_request() - 1) / largest_request();
  const std::size_t bytes = round_up_to((wanted + requests - 1) / requests, alignment);

  BufferPool::Lease lease = buffers_->pool().take();
  const std::span<std::byte> buffer = aligned(lease.first(DirectBuffers::bytes), bytes);
  ssize_t got = 0;
  do {
    got = access_.read(buffer, offset - skipped);
  } while (got < 0 && errno == EINTR);
  if (got < 0) {
    refuse_or_fail("read", offset, errno);
    return 0;
  }
  if (static_cast<std::size_t>(got) <= skipped) return 0;
  const std::size_t given = std::min(static_cast<std::size_t>(got) - skipped, into.size());
  std::memcpy(into.data(), buffer.data() + skipped, given);
  return given;
}

void DirectFile::write_at(std::uint64_t offset, std::span<const std::byte> from) {
  while (access_.write && !from.empty() && !refused_) {
    const std::size_t put = write_some(offset, from);
    if (put == 0) break;
    offset += put;
    from = from.subspan(put);
  }
  if (!from.empty()) usual_->write_at(offset, from);
}

// One request for the first of those bytes: how many of them it took. None where the file refuses.
std::size_t DirectFile::write_some(std::uint64_t offset, std::span<const std::byte> from) {
  const std::size_t alignment = access_.alignment;
  if (offset % alignment != 0) throw std::logic_error("a direct write between two blocks");
  const std::size_t count = std::min(from.size(), largest_request());
  BufferPool::Lease lease = buffers_->pool().take();
  const std::span<std::byte> buffer =
      aligned(lease.first(DirectBuffers::bytes), round_up_to(count, alignment));
  std::memcpy(buffer.data(), from.data(), count);
  std::memset(buffer.data() + count, 0, buffer.size() - count);
  ssize_t put = 0;
  do {
    put = access_.write(buffer, offset);
  } while (put < 0 && errno == EINTR);
  if (put < 0) {
    refuse_or_fail("written", offset, errno);
    return 0;
  }
  written_ = true;
  // The rest of a block that was begun is written with it again; `usual` says why there is no more.
  return std::min(static_cast<std::size_t>(put) / alignment * alignment, count);
}

void DirectFile::sync() {
  usual_->sync();
  if (access_.sync && access_.sync() != 0)
    throw Error(fmt::format("{} cannot be flushed to storage: {}", name_, reason_of(errno)));
}

// What a buffer holds, wherever it begins.
std::size_t DirectFile::largest_request() const {
  return (DirectBuffers::bytes - access_.alignment) / access_.alignment * access_.alignment;
}

std::span<std::byte> DirectFile::aligned(std::span<std::byte> buffer, std::size_t bytes) const {
  const auto address = reinterpret_cast<std::uintptr_t>(buffer.data());
  return buffer.subspan(round_up_to(address, access_.alignment) - address, bytes);
}

void DirectFile::refuse_or_fail(const char* what, std::uint64_t offset, int reason) {
  // What the page cache has of a file that was written past it may be stale.
  if (!is_refusal(reason) || written_) {
    throw Error(
        fmt::format("{} cannot be {} at byte {}: {}", name_, what, offset, reason_of(reason)));
  }
  refused_ = true;
  buffers_->refuse(name_, reason_of(reason));
}

namespace {

/// `usual`, with direct access where the file has any of at most this alignment.
std::unique_ptr<File> with_direct_access(std::unique_ptr<File> usual,
                                         const std::filesystem::path& path, FileMode mode,
                                         std::size_t most_alignment,
                                         const std::shared_ptr<DirectBuffers>& buffers) {
  const std::string name = printable(path.string());
  DirectAccess access;
  try {
    access = open_direct_access(path, mode);
    if (access.alignment > most_alignment)
      throw Error(fmt::format("an alignment of {} bytes", access.alignment));
  } catch (const Error& error) {
    buffers->refuse(name, error.what());
    return usual;
  }
  return std::make_unique<DirectFile>(std::move(usual), name, std::move(access), buffers);
}

}  // namespace

FileOpener direct_opener(FileOpener usual, std::function<void(const std::string&)> refused) {
  const auto buffers = std::make_shared<DirectBuffers>(std::move(refused));
  return [buffers, usual = std::move(usual)](const std::filesystem::path& path, FileMode mode) {
    auto file = usual(path, mode);
    if (mode != FileMode::read) return file;
    return with_direct_access(std::move(file), path, mode, DirectAccess::largest_alignment,
                              buffers);
  };
}

FileOpener direct_block_opener(std::function<void(const std::string&)> refused) {
  const auto buffers = std::make_shared<DirectBuffers>(std::move(refused));
  return [buffers](const std::filesystem::path& path, FileMode mode) {
    return with_direct_access(open_posix_file(path, mode), path, mode, direct_block, buffers);
  };
}

}  // namespace stream_cqsa
