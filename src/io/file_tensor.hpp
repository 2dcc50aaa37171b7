// Tensors whose elements lie packed in a file from some offset on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "io/partial_file.hpp"
#include "stream_cqsa/files.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// Reads what a block needs, in requests as long as the layout allows. float64 is rounded to fp32
/// through a buffer of at most 1 MiB.
class FileSource final : public TensorSource {
 public:
  /// desc.bytes() bytes of `file` from `offset` on.
  FileSource(TensorDesc desc, std::unique_ptr<File> file, std::uint64_t offset);
  void read(const Block& block, std::span<std::byte> into) override;

 private:
  void read_doubles(std::uint64_t offset, std::span<std::byte> into);

  std::unique_ptr<File> file_;
  std::uint64_t offset_;
};

/// A PartialFile that several sinks write, each its own part.
class SharedFile {
 public:
  /// Takes the file's full size at once and writes `header`; what is never written stays zero.
  /// Throws Error.
  SharedFile(std::unique_ptr<PartialFile> file, const std::string& header, std::int64_t data_bytes,
             std::size_t parts);
  /// A file that another process made so, and will commit.
  explicit SharedFile(std::unique_ptr<File> joined) : joined_(std::move(joined)) {}

  File& file() { return joined_ ? *joined_ : file_->file(); }
  /// Makes what was written durable.
  void sync() { joined_ ? joined_->sync() : file_->sync(); }

  /// To be called once for each part, when it is complete. The last one commits the file.
  void commit_part();

 private:
  std::unique_ptr<PartialFile> file_;
  std::unique_ptr<File> joined_;
  std::size_t missing_ = 0;  ///< parts
};

/// Writes a tensor, in requests of about 1 MiB or more wherever the block is that large, except
/// that with bshd a part of the heads of 4 KiB or more a token goes token by token. Memory: one
/// buffer of 1 MiB, or of one token row where that is longer.
class FileSink final : public TensorSink {
 public:
  /// desc.bytes() bytes of `file` from `offset` on.
  FileSink(TensorDesc desc, std::shared_ptr<SharedFile> file, std::uint64_t offset);
  void write(const Block& block, std::span<const std::byte> from) override;
  void read(const Block& block, std::span<std::byte> into) override;
  void sync() override { file_->sync(); }
  void commit() override;

 private:
  void read_vectors(std::int64_t first, std::span<std::byte> into);
  void read_heads(const Block& block, std::span<std::byte> into);
  void read_by_head(const Block& block, std::span<std::byte> into);
  void write_vectors(std::int64_t first, std::span<const std::byte> from);
  void write_by_token(const Block& block, std::span<const std::byte> from);
  void overlay_heads(const Block& block, std::span<const std::byte> from);
  void write_by_head(const Block& block, std::span<const std::byte> from);

  std::shared_ptr<SharedFile> file_;
  std::uint64_t offset_;      ///< of the data in the file
  std::size_t vector_bytes_;  ///< dim * element size
  std::vector<std::byte> buffer_;
};

}  // namespace stream_cqsa
