#include "mpi/file.hpp"

#include <fmt/format.h>
#include <mpi.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <system_error>

#include "io/stored_tensor.hpp"
#include "mpi/error.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr std::size_t largest_request = std::size_t{1} << 30;

/// errno after a failed MPI call, where it says something about storage: MPI libraries do not
/// promise to leave it, and most of their own codes say no more than "I/O error".
std::string storage_reason() {
  for (const int reason : {ENOSPC, EDQUOT, EFBIG, EIO, ENOENT, EACCES, EPERM, EROFS, EISDIR,
                           ENOTDIR, EMFILE, ENFILE, ENAMETOOLONG, ESTALE}) {
    if (errno == reason) return std::generic_category().message(reason);
  }
  return {};
}

class MpiFile final : public File {
 public:
  MpiFile(const std::filesystem::path& path, FileMode mode) : path_(printable(path.string())) {
    const bool read = mode == FileMode::read;
    const int flags = read ? MPI_MODE_RDONLY : MPI_MODE_RDWR | MPI_MODE_CREATE;
    errno = 0;
    check(MPI_File_open(MPI_COMM_SELF, path.c_str(), flags, MPI_INFO_NULL, &handle_),
          read ? "cannot be opened" : "cannot be created");
    try {
      if (mode == FileMode::create) resize(0);
    } catch (...) {
      MPI_File_close(&handle_);
      throw;
    }
  }
  MpiFile(const MpiFile&) = delete;
  MpiFile& operator=(const MpiFile&) = delete;
  ~MpiFile() override { MPI_File_close(&handle_); }

  std::uint64_t size() override {
    MPI_Offset size = 0;
    errno = 0;
    check(MPI_File_get_size(handle_, &size), "has no size");
    return static_cast<std::uint64_t>(size);
  }

  void read_at(std::uint64_t offset, std::span<std::byte> into) override {
    while (!into.empty()) {
      const auto part = into.first(std::min(into.size(), largest_request));
      MPI_Status status;
      errno = 0;
      check(MPI_File_read_at(handle_, static_cast<MPI_Offset>(offset), part.data(),
                             static_cast<int>(part.size()), MPI_BYTE, &status),
            fmt::format("cannot be read at byte {}", offset));
      const std::size_t got = count(status, "ends or cannot be read", offset);
      offset += got;
      into = into.subspan(got);
    }
  }

  void write_at(std::uint64_t offset, std::span<const std::byte> from) override {
    while (!from.empty()) {
      const auto part = from.first(std::min(from.size(), largest_request));
      MPI_Status status;
      errno = 0;
      check(MPI_File_write_at(handle_, static_cast<MPI_Offset>(offset), part.data(),
                              static_cast<int>(part.size()), MPI_BYTE, &status),
            fmt::format("cannot be written at byte {}", offset));
      const std::size_t put = count(status, "cannot be written", offset);
      offset += put;
      from = from.subspan(put);
    }
  }

  void resize(std::uint64_t size) override {
    errno = 0;
    check(MPI_File_set_size(handle_, static_cast<MPI_Offset>(size)),
          fmt::format("cannot have {} bytes", size));
  }

  void sync() override {
    errno = 0;
    check(MPI_File_sync(handle_), "cannot be flushed to storage");
  }

 private:
  void check(int code, const std::string& what) const {
    if (code == MPI_SUCCESS) return;
    const std::string reason = storage_reason();
    throw Error(
        fmt::format("{} {}: {}", path_, what, reason.empty() ? mpi_error_text(code) : reason));
  }

  /// Bytes that a call moved. Open MPI reports the end of a file and a full disk alike as success
  /// with fewer bytes than asked for; only asking for the rest tells the reason.
  std::size_t count(const MPI_Status& status, const char* failure, std::uint64_t offset) const {
    const std::string reason = storage_reason();
    int bytes = 0;
    STREAM_CQSA_MPI(MPI_Get_count(&status, MPI_BYTE, &bytes));
    if (bytes != MPI_UNDEFINED && bytes > 0) return static_cast<std::size_t>(bytes);
    throw Error(fmt::format("{} {} at byte {}{}{}", path_, failure, offset,
                            reason.empty() ? "" : ": ", reason));
  }

  std::string path_;  ///< for messages
  MPI_File handle_ = MPI_FILE_NULL;
};

}  // namespace

std::unique_ptr<File> open_mpi_file(const std::filesystem::path& path, FileMode mode) {
  return std::make_unique<MpiFile>(path, mode);
}

}  // namespace stream_cqsa
