// Files by plain system calls.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "io/stored_tensor.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/files.hpp"

namespace stream_cqsa {
namespace {

constexpr std::size_t largest_request = std::size_t{1} << 30;

class PosixFile final : public File {
 public:
  PosixFile(const std::filesystem::path& path, FileMode mode) : path_(printable(path.string())) {
    const int flags = mode == FileMode::read     ? O_RDONLY
                      : mode == FileMode::create ? O_RDWR | O_CREAT | O_TRUNC
                                                 : O_RDWR | O_CREAT;
    constexpr mode_t permissions = 0666;
    do {
      descriptor_ = ::open(path.c_str(), flags | O_CLOEXEC, permissions);
    } while (descriptor_ < 0 && errno == EINTR);
    if (descriptor_ < 0) fail(mode == FileMode::read ? "cannot be opened" : "cannot be created");
  }
  PosixFile(const PosixFile&) = delete;
  PosixFile& operator=(const PosixFile&) = delete;
  ~PosixFile() override { ::close(descriptor_); }

  std::uint64_t size() override {
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0) fail("has no size");
    return static_cast<std::uint64_t>(status.st_size);
  }

  void read_at(std::uint64_t offset, std::span<std::byte> into) override {
    while (!into.empty()) {
      const ssize_t got = ::pread(descriptor_, into.data(), std::min(into.size(), largest_request),
                                  static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(fmt::format("cannot be read at byte {}", offset));
      if (got == 0)
        throw Error(fmt::format("{} ends at byte {}, more was expected", path_, offset));
      offset += static_cast<std::uint64_t>(got);
      into = into.subspan(static_cast<std::size_t>(got));
    }
  }

  void write_at(std::uint64_t offset, std::span<const std::byte> from) override {
    while (!from.empty()) {
      const ssize_t put = ::pwrite(descriptor_, from.data(), std::min(from.size(), largest_request),
                                   static_cast<off_t>(offset));
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) fail(fmt::format("cannot be written at byte {}", offset));
      if (put == 0) throw Error(fmt::format("{} takes no more bytes at {}", path_, offset));
      offset += static_cast<std::uint64_t>(put);
      from = from.subspan(static_cast<std::size_t>(put));
    }
  }

  void resize(std::uint64_t size) override {
    int status = 0;
    do {
      status = ::ftruncate(descriptor_, static_cast<off_t>(size));
    } while (status != 0 && errno == EINTR);
    if (status != 0) fail(fmt::format("cannot have {} bytes", size));
  }

  void sync() override {
    if (::fsync(descriptor_) != 0) fail("cannot be flushed to storage");
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    const int reason = errno;
    throw Error(fmt::format("{} {}: {}", path_, what, std::generic_category().message(reason)));
  }

  std::string path_;  ///< for messages
  int descriptor_ = -1;
};

}  // namespace

std::unique_ptr<File> open_posix_file(const std::filesystem::path& path, FileMode mode) {
  return std::make_unique<PosixFile>(path, mode);
}

}  // namespace stream_cqsa
