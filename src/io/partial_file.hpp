// A file that gets its name only when it is complete.
#pragma once

#include <filesystem>
#include <memory>

#include "stream_cqsa/files.hpp"

namespace stream_cqsa {

/// `path`.partial until commit(); removed if destroyed before.
class PartialFile {
 public:
  /// Throws what `open` throws.
  PartialFile(std::filesystem::path path, const FileOpener& open);
  PartialFile(const PartialFile&) = delete;
  PartialFile& operator=(const PartialFile&) = delete;
  ~PartialFile();

  File& file() { return *file_; }

  /// Makes the contents durable, then the name. file() is closed after that. Throws Error.
  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path partial_;
  std::unique_ptr<File> file_;
};

}  // namespace stream_cqsa
