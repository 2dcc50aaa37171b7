// Tensors in the caller's memory.
#include <fmt/format.h>

#include <cstring>
#include <utility>

#include "io/blocks.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/files.hpp"

namespace stream_cqsa {
namespace {

void check_memory(const TensorDesc& desc, std::size_t bytes, DType type) {
  check_desc(desc);
  const std::int64_t needed = desc.elements() * size_of(type);
  if (bytes != static_cast<std::size_t>(needed)) {
    throw InputError(fmt::format("{}: {} bytes of memory, {} are needed as {}", desc.name, bytes,
                                 needed, name_of(type)));
  }
}

class MemorySource final : public TensorSource {
 public:
  MemorySource(TensorDesc desc, std::span<const std::byte> data)
      : TensorSource(std::move(desc)),
        data_(data.data()),
        vector_bytes_(desc_.dim * size_of(storage_type(desc_.dtype))) {
    check_memory(desc_, data.size(), storage_type(desc_.dtype));
  }

  void read(const Block& block, std::span<std::byte> into) override {
    check_read(desc_, block, into.size());
    std::byte* out = into.data();
    for_each_run(desc_, block, [&](std::int64_t first, std::int64_t vectors) {
      const std::int64_t bytes = vectors * vector_bytes_;
      if (bytes == 0) return;  // memcpy takes no null pointer, not even of nothing
      std::memcpy(out, data_ + first * vector_bytes_, static_cast<std::size_t>(bytes));
      out += bytes;
    });
  }

  std::optional<StridedRows> resident(const Block& block) const override {
    const std::int64_t first =
        vector_index(desc_, block.batch, block.tokens.begin, block.heads.begin);
    const Block whole{0, {0, desc_.tokens}, {0, desc_.heads}};
    return packed_rows(data_ + first * vector_bytes_, whole, desc_.layout, vector_bytes_);
  }

 private:
  const std::byte* data_;
  std::int64_t vector_bytes_;
};

class MemorySink final : public TensorSink {
 public:
  MemorySink(TensorDesc desc, std::span<std::byte> data)
      : TensorSink(std::move(desc)), data_(data.data()) {
    check_memory(desc_, data.size(), desc_.dtype);
  }

  void write(const Block& block, std::span<const std::byte> from) override {
    for_each_vector(block, from.size(), [&](std::byte* vector, std::size_t at, std::size_t bytes) {
      std::memcpy(vector, from.data() + at, bytes);
    });
  }

  void read(const Block& block, std::span<std::byte> into) override {
    for_each_vector(block, into.size(), [&](std::byte* vector, std::size_t at, std::size_t bytes) {
      std::memcpy(into.data() + at, vector, bytes);
    });
  }

  void commit() override {}

 private:
  // Calls visit(a vector, where it is in the packed block, its bytes).
  template <typename Visit>
  void for_each_vector(const Block& block, std::size_t block_bytes, const Visit& visit) {
    check_block(desc_, block, block_bytes, size_of(desc_.dtype));
    const auto bytes = static_cast<std::size_t>(desc_.dim * size_of(desc_.dtype));
    std::size_t at = 0;
    for (std::int64_t token = block.tokens.begin; token < block.tokens.end; ++token) {
      for (std::int64_t head = block.heads.begin; head < block.heads.end; ++head, at += bytes) {
        const auto vector = static_cast<std::size_t>(vector_index(desc_, block.batch, token, head));
        visit(data_ + vector * bytes, at, bytes);
      }
    }
  }

  std::byte* data_;
};

}  // namespace

std::unique_ptr<TensorSource> make_memory_source(TensorDesc desc, std::span<const std::byte> data) {
  return std::make_unique<MemorySource>(std::move(desc), data);
}

std::unique_ptr<TensorSink> make_memory_sink(TensorDesc desc, std::span<std::byte> data) {
  return std::make_unique<MemorySink>(std::move(desc), data);
}

}  // namespace stream_cqsa
