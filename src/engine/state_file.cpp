#include "engine/state_file.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <string>
#include <system_error>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

StateFile StateFile::scratch(const std::filesystem::path& directory, std::int64_t slot_bytes,
                             const FileOpener& open) {
  // A name of its own: processes of several hosts may share the directory and have equal numbers.
  std::string path = directory / "stream-cqsa-accumulators-XXXXXX";
  const int descriptor = mkstemp(path.data());
  if (descriptor < 0) {
    throw Error(fmt::format("scratch directory {} cannot be written: {}", directory.string(),
                            std::generic_category().message(errno)));
  }
  ::close(descriptor);
  auto file = open(path, FileMode::create);
  // Without a name it goes when the process does, however that ends.
  std::filesystem::remove(path);
  return {std::move(file), slot_bytes, false};
}

StateFile StateFile::kept(const std::filesystem::path& path, std::int64_t slot_bytes,
                          const FileOpener& open) {
  return {open(path, FileMode::update), slot_bytes, true};
}

std::int64_t StateFile::take() {
  if (free_.empty()) {
    free_.push_back(static_cast<std::int64_t>(users_.size()));
    users_.push_back(0);
  }
  const std::int64_t slot = free_.back();
  free_.pop_back();
  ++users_[static_cast<std::size_t>(slot)];
  return slot;
}

void StateFile::restore(std::span<const std::int64_t> slots, std::int32_t users) {
  for (const std::int64_t slot : slots) {
    const auto at = static_cast<std::size_t>(slot);
    if (at >= users_.size()) users_.resize(at + 1, 0);
    users_[at] += users;
  }
  for (std::size_t slot = users_.size(); slot-- > 0;) {
    if (users_[slot] == 0) free_.push_back(static_cast<std::int64_t>(slot));
  }
}

void StateFile::give(std::int64_t slot) {
  if (--users_[static_cast<std::size_t>(slot)] == 0) free_.push_back(slot);
}

void StateFile::write(std::int64_t slot, std::span<const std::byte> from) {
  file_->write_at(offset_of(slot), from);
}

void StateFile::read(std::int64_t slot, std::span<std::byte> into) {
  file_->read_at(offset_of(slot), into);
}

bool StateFile::holds(std::int64_t slot, std::int64_t bytes) {
  const auto size = static_cast<std::int64_t>(file_->size());
  return slot >= 0 && slot < size / slot_bytes_ + 1 && slot * slot_bytes_ + bytes <= size;
}

}  // namespace stream_cqsa
