#include "mpi/file.hpp"

#include <fmt/format.h>
#include <mpi.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <string>
#include <system_error>
#include <vector>

#include "io/stored_tensor.hpp"
#include "mpi/error.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr std::size_t largest_request = std::size_t{1} << 30;

// Open MPI lets one call at a time use a handle, so threads that read or write a file side by side
// need several. That one handle sees at once what another wrote is more than MPI promises of them,
// but so it is of all that end in pread() and pwrite() on one node.
constexpr int handles_of_a_file = 4;

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
    try {
      for (int i = 0; i < handles_of_a_file; ++i) {
        MPI_File handle = MPI_FILE_NULL;
        errno = 0;
        check(MPI_File_open(MPI_COMM_SELF, path.c_str(), flags, MPI_INFO_NULL, &handle),
              read ? "cannot be opened" : "cannot be created");
        handles_.push_back(handle);
      }
      idle_ = handles_;
      if (mode == FileMode::create) resize(0);
    } catch (...) {
      close();
      throw;
    }
  }
  MpiFile(const MpiFile&) = delete;
  MpiFile& operator=(const MpiFile&) = delete;
  ~MpiFile() override { close(); }

  std::uint64_t size() override {
    const Handle handle(*this);
    MPI_Offset size = 0;
    errno = 0;
    check(MPI_File_get_size(handle.mpi, &size), "has no size");
    return static_cast<std::uint64_t>(size);
  }

  void read_at(std::uint64_t offset, std::span<std::byte> into) override {
    const Handle handle(*this);
    while (!into.empty()) {
      const auto part = into.first(std::min(into.size(), largest_request));
      MPI_Status status;
      errno = 0;
      check(MPI_File_read_at(handle.mpi, static_cast<MPI_Offset>(offset), part.data(),
                             static_cast<int>(part.size()), MPI_BYTE, &status),
            fmt::format("cannot be read at byte {}", offset));
      const std::size_t got = count(status, "ends or cannot be read", offset);
      offset += got;
      into = into.subspan(got);
    }
  }

  void write_at(std::uint64_t offset, std::span<const std::byte> from) override {
    const Handle handle(*this);
    while (!from.empty()) {
      const auto part = from.first(std::min(from.size(), largest_request));
      MPI_Status status;
      errno = 0;
      check(MPI_File_write_at(handle.mpi, static_cast<MPI_Offset>(offset), part.data(),
                              static_cast<int>(part.size()), MPI_BYTE, &status),
            fmt::format("cannot be written at byte {}", offset));
      const std::size_t put = count(status, "cannot be written", offset);
      offset += put;
      from = from.subspan(put);
    }
  }

  void resize(std::uint64_t size) override {
    const Handle handle(*this);
    errno = 0;
    check(MPI_File_set_size(handle.mpi, static_cast<MPI_Offset>(size)),
          fmt::format("cannot have {} bytes", size));
  }

  void sync() override {
    const Handle handle(*this);
    errno = 0;
    check(MPI_File_sync(handle.mpi), "cannot be flushed to storage");
  }

 private:
  /// One that no other thread uses for as long as this lives.
  class Handle {
   public:
    explicit Handle(MpiFile& file) : file_(file) {
      std::unique_lock lock(file_.mutex_);
      file_.given_back_.wait(lock, [&] { return !file_.idle_.empty(); });
      mpi = file_.idle_.back();
      file_.idle_.pop_back();
    }
    Handle(const Handle&) = delete;
    Handle& operator=(const Handle&) = delete;
    ~Handle() {
      const std::scoped_lock lock(file_.mutex_);
      file_.idle_.push_back(mpi);
      file_.given_back_.notify_one();
    }
    MPI_File mpi = MPI_FILE_NULL;

   private:
    MpiFile& file_;
  };

  void close() {
    for (MPI_File& handle : handles_) MPI_File_close(&handle);
  }

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
  std::vector<MPI_File> handles_;
  std::mutex mutex_;  // guards idle_
  std::condition_variable given_back_;
  std::vector<MPI_File> idle_;
};

}  // namespace

std::unique_ptr<File> open_mpi_file(const std::filesystem::path& path, FileMode mode) {
  return std::make_unique<MpiFile>(path, mode);
}

}  // namespace stream_cqsa
