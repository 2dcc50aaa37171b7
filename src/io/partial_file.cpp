#include "io/partial_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <system_error>
#include <utility>

#include "io/stored_tensor.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

std::string reason_of(int error) { return std::generic_category().message(error); }

/// A rename is durable only when its directory is.
void sync_directory(const std::filesystem::path& directory) {
  const Descriptor opened(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // Some file systems neither open nor flush directories; the name is in place all the same.
  if (opened.number() < 0) return;
  if (::fsync(opened.number()) != 0 && errno != EINVAL && errno != ENOTSUP) {
    const int reason = errno;
    throw Error(fmt::format("directory {} cannot be flushed to storage: {}",
                            printable(directory.string()), reason_of(reason)));
  }
}

std::filesystem::path partial_name(std::filesystem::path path) { return path += ".partial"; }

void rename_partial(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::rename(partial_name(path), path, error);
  if (!error) return;
  throw Error(fmt::format("{} cannot be renamed to {}: {}", printable(partial_name(path).string()),
                          printable(path.string()), error.message()));
}

/// Not through a symbolic link: a stale one could name an input.
Descriptor open_regular(const std::filesystem::path& path) {
  constexpr mode_t permissions = 0666;
  int number = 0;
  do {
    // O_NONBLOCK is for pipes, which are refused below.
    number =
        ::open(path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, permissions);
  } while (number < 0 && errno == EINTR);
  const int reason = errno;
  Descriptor opened(number);
  const std::string name = printable(path.string());
  struct stat status {};
  if (number < 0 && ::lstat(path.c_str(), &status) == 0 && S_ISLNK(status.st_mode)) {
    throw InputError(fmt::format("{} is a symbolic link; remove it, or use another name", name));
  }
  if (number < 0) {
    throw InputError(fmt::format("{} cannot be created: {}", name, reason_of(reason)));
  }
  if (::fstat(number, &status) != 0 || !S_ISREG(status.st_mode)) {
    throw InputError(fmt::format("{} is not a regular file; remove it, or use another name", name));
  }
  return opened;
}

std::filesystem::path directory_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : ".";
}

/// Open MPI locks whole files on NFS by fcntl(), and there flock() is a lock of the same kind but
/// of another owner: what it opens it would wait for forever.
bool is_locked_by_mpi(const std::filesystem::path& path) {
  struct statfs system {};
  return ::statfs(directory_of(path).c_str(), &system) == 0 && system.f_type == NFS_SUPER_MAGIC;
}

void lock(int descriptor, const std::filesystem::path& path) {
  int status = 0;
  do {
    status = ::flock(descriptor, LOCK_EX | LOCK_NB);
  } while (status != 0 && errno == EINTR);
  if (status == 0) return;
  const int reason = errno;
  const std::string name = printable(path.string());
  if (reason == EWOULDBLOCK) {
    throw InputError(fmt::format(
        "{} is being written by another run; wait for its end, or use another name", name));
  }
  // Some file systems have no locks; there, runs to one output are not kept apart.
  if (reason == ENOLCK || reason == EOPNOTSUPP || reason == ENOSYS) return;
  throw InputError(fmt::format("{} cannot be locked: {}", name, reason_of(reason)));
}

/// Whether `path` itself, not the target of a link, is the open file.
bool names(const std::filesystem::path& path, int descriptor) {
  struct stat named {};
  struct stat opened {};
  return ::lstat(path.c_str(), &named) == 0 && ::fstat(descriptor, &opened) == 0 &&
         named.st_dev == opened.st_dev && named.st_ino == opened.st_ino;
}

/// A handler may only take names from here: each belongs to whoever exchanged it for null.
std::array<std::atomic<char*>, 16> doomed_names{};
static_assert(std::atomic<char*>::is_always_lock_free);

/// BeginningFiles that live.
std::atomic<int> beginning_files{0};
static_assert(std::atomic<int>::is_always_lock_free);

std::atomic<char*>* register_name(const std::filesystem::path& path) {
  char* name = ::strdup(path.c_str());
  if (!name) return nullptr;
  for (auto& place : doomed_names) {
    char* none = nullptr;
    if (place.compare_exchange_strong(none, name)) return &place;
  }
  std::free(name);
  return nullptr;
}

}  // namespace

Descriptor open_locked(const std::filesystem::path& path) {
  for (;;) {
    Descriptor opened = open_regular(path);
    lock(opened.number(), path);
    // Between open and lock, the run that held the lock may have renamed or removed the file.
    if (names(path, opened.number())) return opened;
  }
}

DoomedName::DoomedName(const std::filesystem::path& path) : place_(register_name(path)) {}

void DoomedName::forget() {
  if (place_) std::free(place_->exchange(nullptr));
  place_ = nullptr;
}

// Blocked here, the signals go to other threads, whose handlers wait, or wait themselves.
BeginningFile::BeginningFile() {
  sigset_t all;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_BLOCK, &all, &before_);
  ++beginning_files;
}

BeginningFile::~BeginningFile() {
  --beginning_files;
  ::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

void remove_doomed_files() noexcept {
  constexpr timespec moment{0, 1'000'000};
  for (int moments = 0; beginning_files > 0 && moments < 1000; ++moments)
    ::nanosleep(&moment, nullptr);
  for (auto& place : doomed_names) {
    if (const char* name = place.exchange(nullptr)) ::unlink(name);
  }
}

Descriptor::Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(number_, other.number_);
  return *this;
}

Descriptor::~Descriptor() {
  if (number_ >= 0) ::close(number_);
}

LockFile::LockFile(const std::filesystem::path& path)
    : path_(path), descriptor_(open_locked(path_)), doomed_(path_) {}

LockFile::~LockFile() {
  doomed_.forget();
  std::error_code ignored;
  std::filesystem::remove(path_, ignored);
}

PartialFile::PartialFile(std::filesystem::path path, const FileOpener& open, bool keep)
    : path_(std::move(path)),
      partial_(partial_name(path_)),
      keep_(keep),
      beginning_(std::in_place),
      lock_file_(is_locked_by_mpi(path_) ? std::make_unique<LockFile>(partial_.string() + ".lock")
                                         : nullptr),
      opened_(lock_file_ ? open_regular(partial_) : open_locked(partial_)),
      doomed_(partial_) {
  if (keep_) doomed_.forget();
  beginning_.reset();
  try {
    file_ = open(partial_, keep_ ? FileMode::update : FileMode::create);
  } catch (...) {
    if (!keep_) remove_partial();
    throw;
  }
}

PartialFile::~PartialFile() {
  if (!partial_.empty() && !keep_) remove_partial();
}

/// While the lock is held: after it, the name may be another run's. So it may once it is free, and
/// is forgotten before.
void PartialFile::remove_partial() {
  file_.reset();
  doomed_.forget();
  std::error_code ignored;
  std::filesystem::remove(partial_, ignored);
}

void PartialFile::sync() {
  if (::fsync(opened_.number()) == 0) return;
  const int reason = errno;
  throw Error(fmt::format("{} cannot be flushed to storage: {}", printable(partial_.string()),
                          reason_of(reason)));
}

void PartialFile::commit() {
  file_->sync();
  file_.reset();
  doomed_.forget();
  rename_partial(path_);
  partial_.clear();
  opened_ = Descriptor(-1);
  lock_file_.reset();
  sync_directory(directory_of(path_));
}

bool PartialFile::can_publish(const std::filesystem::path& path) {
  return std::filesystem::exists(partial_name(path)) || std::filesystem::exists(path);
}

void PartialFile::publish(const std::filesystem::path& path) {
  const bool done = !std::filesystem::exists(partial_name(path)) && std::filesystem::exists(path);
  if (!done) rename_partial(path);
  sync_directory(directory_of(path));
}

}  // namespace stream_cqsa
