// Text files that appear under their name when they are complete: reports, traces, drawings.
#pragma once

#include <filesystem>
#include <fstream>
#include <ostream>
#include <string>

namespace stream_cqsa {

/// Opened as `path`.partial, so that what cannot be written is found before the work; renamed by
/// commit(); removed if that never comes. An empty path is no file at all: stream() is null.
class TextFile {
 public:
  /// Throws InputError when the file cannot be created.
  explicit TextFile(const std::string& path);
  ~TextFile();
  TextFile(const TextFile&) = delete;
  TextFile& operator=(const TextFile&) = delete;

  std::ostream* stream() { return path_.empty() ? nullptr : &stream_; }

  /// Throws Error when something could not be written.
  void commit();

 private:
  std::filesystem::path path_, partial_;
  std::ofstream stream_;
};

}  // namespace stream_cqsa
