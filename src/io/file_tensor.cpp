#include "io/file_tensor.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "io/blocks.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr std::size_t buffer_limit = std::size_t{1} << 20;

std::size_t to_size(std::int64_t value) { return static_cast<std::size_t>(value); }

}  // namespace

FileSource::FileSource(TensorDesc desc, std::unique_ptr<File> file, std::uint64_t offset)
    : TensorSource(std::move(desc)), file_(std::move(file)), offset_(offset) {
  check_desc(desc_);
}

void FileSource::read(const Block& block, std::span<std::byte> into) {
  check_read(desc_, block, into.size());
  const std::int64_t stored_bytes = desc_.dim * size_of(desc_.dtype);
  const std::int64_t memory_bytes = desc_.dim * size_of(storage_type(desc_.dtype));
  for_each_run(desc_, block, [&](std::int64_t first, std::int64_t vectors) {
    const std::uint64_t offset = offset_ + static_cast<std::uint64_t>(first * stored_bytes);
    const auto part = into.first(to_size(vectors * memory_bytes));
    into = into.subspan(part.size());
    if (desc_.dtype == DType::f64) {
      read_doubles(offset, part);
    } else {
      file_->read_at(offset, part);
    }
  });
}

void FileSource::read_doubles(std::uint64_t offset, std::span<std::byte> into) {
  const std::size_t count = into.size() / sizeof(float);
  std::vector<double> buffer(std::min(count, buffer_limit / sizeof(double)));
  for (std::size_t done = 0; done < count;) {
    const auto part = std::span(buffer).first(std::min(buffer.size(), count - done));
    file_->read_at(offset + done * sizeof(double), std::as_writable_bytes(part));
    // The caller's bytes need not be aligned for fp32.
    std::byte* out = into.data() + done * sizeof(float);
    for (const double value : part) {
      const auto rounded = static_cast<float>(value);
      std::memcpy(out, &rounded, sizeof rounded);
      out += sizeof rounded;
    }
    done += part.size();
  }
}

SharedFile::SharedFile(std::unique_ptr<PartialFile> file, const std::string& header,
                       std::int64_t data_bytes, std::size_t parts)
    : file_(std::move(file)), missing_(parts) {
  file_->file().resize(header.size() + static_cast<std::uint64_t>(data_bytes));
  file_->file().write_at(0, std::as_bytes(std::span(header)));
}

void SharedFile::commit_part() {
  if (joined_) throw std::logic_error("the file of another process is not committed here");
  if (--missing_ == 0) file_->commit();
}

FileSink::FileSink(TensorDesc desc, std::shared_ptr<SharedFile> file, std::uint64_t offset,
                   bool staged)
    : TensorSink(std::move(desc)),
      file_(std::move(file)),
      vectors_{file_->file(), offset, to_size(desc_.dim * size_of(desc_.dtype))},
      buffers_(std::min(std::max(buffer_limit, to_size(desc_.heads) * vectors_.bytes),
                        to_size(desc_.bytes()))) {
  if (desc_.layout == Layout::bshd) rows_.emplace(desc_, vectors_, buffers_, staged);
}

HeadMajor FileSink::batch_entry(std::int64_t batch) const {
  return {vector_index(desc_, batch, 0, 0), desc_.tokens};
}

void FileSink::write(const Block& block, std::span<const std::byte> from) {
  check_block(desc_, block, from.size(), size_of(desc_.dtype));
  if (from.empty()) return;
  if (rows_) return rows_->write(block, from);
  write_heads(vectors_, batch_entry(block.batch), block.tokens, block.heads, from, buffers_);
}

void FileSink::read(const Block& block, std::span<std::byte> into) {
  check_block(desc_, block, into.size(), size_of(desc_.dtype));
  if (into.empty()) return;
  if (rows_) return rows_->read(block, into);
  read_heads(vectors_, batch_entry(block.batch), block.tokens, block.heads, into, buffers_);
}

void FileSink::commit() {
  if (rows_) rows_->finish();
  file_->commit_part();
}

}  // namespace stream_cqsa
