// Text files that appear under their name when they are complete: reports, traces, drawings.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <ostream>
#include <streambuf>
#include <string>

#include "io/partial_file.hpp"

namespace stream_cqsa {

/// Collects what is written to a stream and passes it on to a file.
class FileBuffer final : public std::streambuf {
 public:
  explicit FileBuffer(File& file);
  /// Why the file took no more; empty while it does.
  const std::string& failure() const { return failure_; }

 protected:
  int_type overflow(int_type character) override;
  int sync() override;

 private:
  File& file_;
  std::uint64_t offset_ = 0;  ///< in the file, of the buffer's first byte
  std::array<char, 1 << 16> buffer_;
  std::string failure_;
};

/// A PartialFile from construction on, so that what cannot be written is found before the work;
/// renamed by commit(); removed if that never comes. An empty path is no file at all: stream() is
/// null.
class TextFile {
 public:
  /// Throws InputError when the file cannot be created or is being written by another run.
  explicit TextFile(const std::string& path);

  std::ostream* stream() { return file_ ? &stream_ : nullptr; }

  /// Throws Error when something could not be written.
  void commit();

 private:
  std::unique_ptr<PartialFile> file_;
  std::unique_ptr<FileBuffer> buffer_;
  std::ostream stream_{nullptr};
};

}  // namespace stream_cqsa
