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
/// From a page on, a write costs less than reading and writing the rest of its row.
constexpr std::size_t shortest_write = std::size_t{4} << 10;

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

FileSink::FileSink(TensorDesc desc, std::shared_ptr<SharedFile> file, std::uint64_t offset)
    : TensorSink(std::move(desc)),
      file_(std::move(file)),
      offset_(offset),
      vector_bytes_(to_size(desc_.dim * size_of(desc_.dtype))) {
  const std::size_t row_bytes = to_size(desc_.heads) * vector_bytes_;
  buffer_.resize(std::min(std::max(buffer_limit, row_bytes), to_size(desc_.bytes())));
}

void FileSink::write(const Block& block, std::span<const std::byte> from) {
  check_block(desc_, block, from.size(), size_of(desc_.dtype));
  if (from.empty()) return;
  const bool bshd = desc_.layout == Layout::bshd;
  const bool one_run = bshd ? block.heads.size() == desc_.heads || block.tokens.size() == 1
                            : block.heads.size() == 1 || desc_.tokens == 1;
  if (one_run) {
    write_vectors(vector_index(desc_, block.batch, block.tokens.begin, block.heads.begin), from);
  } else if (bshd && to_size(block.heads.size()) * vector_bytes_ >= shortest_write) {
    write_by_token(block, from);
  } else if (bshd) {
    overlay_heads(block, from);
  } else {
    write_by_head(block, from);
  }
}

void FileSink::write_vectors(std::int64_t first, std::span<const std::byte> from) {
  file_->file().write_at(offset_ + static_cast<std::uint64_t>(first) * vector_bytes_, from);
}

/// bshd, some heads, long vectors: each token's part of its row is written where it belongs.
void FileSink::write_by_token(const Block& block, std::span<const std::byte> from) {
  const std::size_t part_bytes = to_size(block.heads.size()) * vector_bytes_;
  for (std::int64_t token = block.tokens.begin; token < block.tokens.end; ++token) {
    write_vectors(vector_index(desc_, block.batch, token, block.heads.begin),
                  from.first(part_bytes));
    from = from.subspan(part_bytes);
  }
}

/// bshd, some heads: whole token rows are read, changed and written back, since many short writes
/// cost far more than the bytes that are moved twice.
void FileSink::overlay_heads(const Block& block, std::span<const std::byte> from) {
  const std::size_t row_bytes = to_size(desc_.heads) * vector_bytes_;
  const std::size_t part_bytes = to_size(block.heads.size()) * vector_bytes_;
  const auto rows_at_once = static_cast<std::int64_t>(buffer_.size() / row_bytes);
  for (std::int64_t token = block.tokens.begin; token < block.tokens.end;) {
    const std::int64_t rows = std::min(rows_at_once, block.tokens.end - token);
    const auto piece = std::span(buffer_).first(to_size(rows) * row_bytes);
    const std::int64_t first = vector_index(desc_, block.batch, token, 0);
    file_->file().read_at(offset_ + static_cast<std::uint64_t>(first) * vector_bytes_, piece);
    std::byte* into = piece.data() + to_size(block.heads.begin) * vector_bytes_;
    for (std::int64_t row = 0; row < rows; ++row, into += row_bytes) {
      std::memcpy(into, from.data(), part_bytes);
      from = from.subspan(part_bytes);
    }
    write_vectors(first, piece);
    token += rows;
  }
}

/// bhsd: the vectors of each head are gathered into runs of tokens.
void FileSink::write_by_head(const Block& block, std::span<const std::byte> from) {
  const std::size_t row_bytes = to_size(block.heads.size()) * vector_bytes_;
  const auto tokens_at_once = static_cast<std::int64_t>(buffer_.size() / vector_bytes_);
  for (std::int64_t head = block.heads.begin; head < block.heads.end; ++head) {
    const std::byte* column = from.data() + to_size(head - block.heads.begin) * vector_bytes_;
    for (std::int64_t token = block.tokens.begin; token < block.tokens.end;) {
      const std::int64_t tokens = std::min(tokens_at_once, block.tokens.end - token);
      const auto piece = std::span(buffer_).first(to_size(tokens) * vector_bytes_);
      for (std::size_t at = 0; at < piece.size(); at += vector_bytes_, column += row_bytes) {
        std::memcpy(piece.data() + at, column, vector_bytes_);
      }
      write_vectors(vector_index(desc_, block.batch, token, head), piece);
      token += tokens;
    }
  }
}

void FileSink::read_vectors(std::int64_t first, std::span<std::byte> into) {
  file_->file().read_at(offset_ + static_cast<std::uint64_t>(first) * vector_bytes_, into);
}

void FileSink::read(const Block& block, std::span<std::byte> into) {
  check_block(desc_, block, into.size(), size_of(desc_.dtype));
  if (into.empty()) return;
  const bool bshd = desc_.layout == Layout::bshd;
  if (bshd ? block.heads.size() == desc_.heads : block.heads.size() == 1) {
    read_vectors(vector_index(desc_, block.batch, block.tokens.begin, block.heads.begin), into);
  } else if (bshd) {
    read_heads(block, into);
  } else {
    read_by_head(block, into);
  }
}

/// bshd, some heads: whole token rows are read, as one long read costs less than many short ones.
void FileSink::read_heads(const Block& block, std::span<std::byte> into) {
  const std::size_t row_bytes = to_size(desc_.heads) * vector_bytes_;
  const std::size_t part_bytes = to_size(block.heads.size()) * vector_bytes_;
  const auto rows_at_once = static_cast<std::int64_t>(buffer_.size() / row_bytes);
  for (std::int64_t token = block.tokens.begin; token < block.tokens.end;) {
    const std::int64_t rows = std::min(rows_at_once, block.tokens.end - token);
    const auto piece = std::span(buffer_).first(to_size(rows) * row_bytes);
    read_vectors(vector_index(desc_, block.batch, token, 0), piece);
    const std::byte* from = piece.data() + to_size(block.heads.begin) * vector_bytes_;
    for (std::int64_t row = 0; row < rows; ++row, from += row_bytes) {
      std::memcpy(into.data(), from, part_bytes);
      into = into.subspan(part_bytes);
    }
    token += rows;
  }
}

/// bhsd: runs of tokens of each head are dealt out to the rows.
void FileSink::read_by_head(const Block& block, std::span<std::byte> into) {
  const std::size_t row_bytes = to_size(block.heads.size()) * vector_bytes_;
  const auto tokens_at_once = static_cast<std::int64_t>(buffer_.size() / vector_bytes_);
  for (std::int64_t head = block.heads.begin; head < block.heads.end; ++head) {
    std::byte* column = into.data() + to_size(head - block.heads.begin) * vector_bytes_;
    for (std::int64_t token = block.tokens.begin; token < block.tokens.end;) {
      const std::int64_t tokens = std::min(tokens_at_once, block.tokens.end - token);
      const auto piece = std::span(buffer_).first(to_size(tokens) * vector_bytes_);
      read_vectors(vector_index(desc_, block.batch, token, head), piece);
      for (std::size_t at = 0; at < piece.size(); at += vector_bytes_, column += row_bytes) {
        std::memcpy(column, piece.data() + at, vector_bytes_);
      }
      token += tokens;
    }
  }
}

void FileSink::commit() { file_->commit_part(); }

}  // namespace stream_cqsa
