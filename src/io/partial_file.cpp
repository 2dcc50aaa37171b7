#include "io/partial_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

/// A rename is durable only when its directory is.
void sync_directory(const std::filesystem::path& directory) {
  const int descriptor = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  // Some file systems neither open nor flush directories; the name is in place all the same.
  if (descriptor < 0) return;
  const int status = ::fsync(descriptor);
  const int reason = errno;
  ::close(descriptor);
  if (status != 0 && reason != EINVAL && reason != ENOTSUP) {
    throw Error(fmt::format("directory {} cannot be flushed to storage: {}", directory.string(),
                            std::generic_category().message(reason)));
  }
}

}  // namespace

PartialFile::PartialFile(std::filesystem::path path, const FileOpener& open)
    : path_(std::move(path)),
      partial_(path_),
      file_(open(partial_ += ".partial", FileMode::create)) {}

PartialFile::~PartialFile() {
  if (partial_.empty()) return;
  file_.reset();
  std::error_code ignored;
  std::filesystem::remove(partial_, ignored);
}

void PartialFile::commit() {
  file_->sync();
  file_.reset();
  std::error_code error;
  std::filesystem::rename(partial_, path_, error);
  if (error) {
    throw Error(fmt::format("{} cannot be renamed to {}: {}", partial_.string(), path_.string(),
                            error.message()));
  }
  partial_.clear();
  sync_directory(path_.has_parent_path() ? path_.parent_path() : ".");
}

}  // namespace stream_cqsa
