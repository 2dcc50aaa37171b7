#include "app/text_file.hpp"

#include <fmt/format.h>

#include <span>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

FileBuffer::FileBuffer(File& file) : file_(file) {
  setp(buffer_.data(), buffer_.data() + buffer_.size());
}

FileBuffer::int_type FileBuffer::overflow(int_type character) {
  if (sync() != 0) return traits_type::eof();
  if (traits_type::eq_int_type(character, traits_type::eof())) return traits_type::not_eof(0);
  return sputc(traits_type::to_char_type(character));
}

int FileBuffer::sync() {
  const auto bytes = static_cast<std::size_t>(pptr() - pbase());
  try {
    file_.write_at(offset_, std::as_bytes(std::span(pbase(), bytes)));
  } catch (const Error& error) {
    failure_ = error.what();
    return -1;
  }
  offset_ += bytes;
  setp(buffer_.data(), buffer_.data() + buffer_.size());
  return 0;
}

TextFile::TextFile(const std::string& path) {
  if (path.empty()) return;
  if (std::filesystem::is_directory(path)) {
    throw InputError(fmt::format("{}: is a directory", path));
  }
  try {
    file_ = std::make_unique<PartialFile>(path, open_posix_file);
  } catch (const Error& error) {
    throw InputError(error.what());
  }
  buffer_ = std::make_unique<FileBuffer>(file_->file());
  stream_.rdbuf(buffer_.get());
}

void TextFile::commit() {
  if (!file_) return;
  if (!stream_.flush()) throw Error(buffer_->failure());
  file_->commit();
}

}  // namespace stream_cqsa
