#include "app/text_file.hpp"

#include <fmt/format.h>

#include <cerrno>
#include <system_error>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

std::string system_reason() { return std::generic_category().message(errno); }

}  // namespace

TextFile::TextFile(const std::string& path) : path_(path) {
  if (path_.empty()) return;
  partial_ = path + ".partial";
  if (std::filesystem::is_directory(path_)) {
    throw InputError(fmt::format("{}: is a directory", path));
  }
  stream_.open(partial_, std::ios::binary);
  if (!stream_) {
    const std::string reason = system_reason();
    throw InputError(fmt::format("{}: cannot be created: {}", path, reason));
  }
}

TextFile::~TextFile() {
  std::error_code ignored;
  if (!partial_.empty()) std::filesystem::remove(partial_, ignored);
}

void TextFile::commit() {
  if (path_.empty()) return;
  stream_.close();
  if (!stream_)
    throw Error(fmt::format("{}: cannot be written: {}", path_.string(), system_reason()));
  std::filesystem::rename(partial_, path_);
  partial_.clear();
}

}  // namespace stream_cqsa
