// Where tensors come from and go to: description, block reads, block writes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "stream_cqsa/dtype.hpp"
#include "stream_cqsa/range.hpp"

namespace stream_cqsa {

enum class Layout {
  bshd,  ///< [batch][token][head][dim], the default
  bhsd,  ///< [batch][head][token][dim]
};
std::string_view name_of(Layout layout);
std::optional<Layout> parse_layout(std::string_view name);

/// A tensor as stored. rank 2 is [tokens, dim], rank 3 is [tokens, heads, dim] (bshd) or
/// [heads, tokens, dim] (bhsd), rank 4 has the batch in front.
struct TensorDesc {
  std::string name;  ///< for messages: "q.npy" or "qkv.safetensors:q"
  DType dtype = DType::f32;
  Layout layout = Layout::bshd;
  int rank = 4;
  std::int64_t batch = 1;
  std::int64_t tokens = 0;
  std::int64_t heads = 1;
  std::int64_t dim = 0;
  bool squeeze_dim = false;  ///< dim is 1 and not an axis of the file, see lse_desc()

  /// The extents on disk, slowest first: `rank` of them, less the last one with squeeze_dim.
  std::vector<std::int64_t> shape() const;

  std::int64_t elements() const { return batch * tokens * heads * dim; }
  std::int64_t bytes() const { return elements() * size_of(dtype); }

  /// The smallest head range that can be read at full speed and contains `heads_wanted`: with bshd
  /// whole token rows, with bhsd just those heads.
  Range readable_heads(Range heads_wanted) const {
    return layout == Layout::bshd ? Range{0, heads} : heads_wanted;
  }
};

/// An lse tensor: fp32 [batch, heads, tokens] on disk, whatever the layout of the output beside it.
/// As a block, a vector is one number: packed [token][head] for TensorSink::write, so that the rows
/// of a single head are contiguous tokens.
inline TensorDesc lse_desc(std::int64_t batch, std::int64_t heads, std::int64_t tokens) {
  return {"lse", DType::f32, Layout::bhsd, 4, batch, tokens, heads, 1, true};
}

/// Some tokens of some heads of one batch entry.
struct Block {
  std::int64_t batch = 0;
  Range tokens;
  Range heads;

  std::int64_t vectors() const { return tokens.size() * heads.size(); }
  friend bool operator==(const Block&, const Block&) = default;
};

/// A block in memory. Vector (token t, head h) of the block starts at
/// data + t * token_stride + h * head_stride (bytes) and is contiguous.
struct StridedRows {
  const std::byte* data = nullptr;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
};

/// The strides of a block that lies packed in the order of `layout`: [token][head][dim] for bshd,
/// [head][token][dim] for bhsd. `vector_bytes` = dim * element size.
inline StridedRows packed_rows(const std::byte* data, const Block& block, Layout layout,
                               std::int64_t vector_bytes) {
  if (layout == Layout::bshd) return {data, block.heads.size() * vector_bytes, vector_bytes};
  return {data, vector_bytes, block.tokens.size() * vector_bytes};
}

/// A readable tensor. Thread-safe: blocks may be read from several threads at once.
class TensorSource {
 public:
  virtual ~TensorSource() = default;

  const TensorDesc& desc() const { return desc_; }

  /// Reads a block into `into`, packed in the order of desc().layout, as
  /// storage_type(desc().dtype). With bshd block.heads must be all heads.
  /// Throws Error when the storage fails.
  virtual void read(const Block& block, std::span<std::byte> into) = 0;

  /// The block where it lies, if the whole tensor is in memory as its storage type: then it is
  /// copied from there and never read. For copies to a GPU at full speed, and beside other work,
  /// that memory should be pinned by Backend::pin().
  virtual std::optional<StridedRows> resident(const Block&) const { return std::nullopt; }

 protected:
  explicit TensorSource(TensorDesc desc) : desc_(std::move(desc)) {}
  TensorDesc desc_;
};

/// The token rows `tokens` of another tensor as a tensor of their own, numbered from 0, and
/// resident where that is. Throws InputError unless there are such rows, at least one.
std::unique_ptr<TensorSource> make_row_source(std::unique_ptr<TensorSource> whole, Range tokens);

/// A tensor being written. It appears under its final name only by commit(); a sink destroyed
/// without commit() leaves nothing behind, unless it was made to be continued by another run.
class TensorSink {
 public:
  virtual ~TensorSink() = default;

  const TensorDesc& desc() const { return desc_; }

  /// Writes a block given packed as [token][head][dim] in desc().dtype. Blocks may come in any
  /// order, and from several threads at once where they have no element in common. Throws Error
  /// when the storage fails.
  virtual void write(const Block& block, std::span<const std::byte> from) = 0;

  /// Reads back a block, as given to write(), now or by an earlier run. Not beside write().
  virtual void read(const Block&, std::span<std::byte>) {
    throw std::logic_error("this sink cannot be read");
  }

  /// Says that a block is complete as an earlier run wrote it: these are its bytes.
  virtual void restore(const Block&, std::span<const std::byte>) {}

  /// Makes durable what was written. May be called beside write().
  virtual void sync() {}

  /// Flushes to storage and moves the tensor to its final name.
  virtual void commit() = 0;

 protected:
  explicit TensorSink(TensorDesc desc) : desc_(std::move(desc)) {}
  TensorDesc desc_;
};

}  // namespace stream_cqsa
