#include "io/token_rows.hpp"

#include <algorithm>

#include "io/blocks.hpp"

namespace stream_cqsa {
namespace {

/// From a page on, a write costs less than reading and writing the rest of its row.
constexpr std::size_t shortest_write = std::size_t{4} << 10;

std::size_t to_size(std::int64_t value) { return static_cast<std::size_t>(value); }

}  // namespace

TokenRows::TokenRows(const TensorDesc& desc, const StoredVectors& vectors, BufferPool& buffers,
                     bool staged)
    : desc_(desc),
      vectors_(vectors),
      buffers_(buffers),
      tile_tokens_(static_cast<std::int64_t>(buffers.bytes() / row_bytes({0, desc.heads}))),
      tiles_per_batch_(ceil_div(desc.tokens, tile_tokens_)) {
  if (staged) staged_.resize(to_size(desc.batch * tiles_per_batch_));
}

// --- tiles ---

TokenRows::Tile TokenRows::tile_of(std::int64_t batch, std::int64_t token) const {
  const std::int64_t number = token / tile_tokens_;
  const std::int64_t begin = number * tile_tokens_;
  return {to_size(batch * tiles_per_batch_ + number),
          batch,
          {begin, std::min(begin + tile_tokens_, desc_.tokens)}};
}

HeadMajor TokenRows::staged_order(const Tile& tile) const {
  return {vector_index(desc_, tile.batch, tile.tokens.begin, 0) - tile.tokens.begin,
          tile.tokens.size()};
}

std::size_t TokenRows::row_bytes(Range heads) const {
  return to_size(heads.size()) * vectors_.bytes;
}

/// Calls visit(tile, the block's part of it, where that is in the packed block, its bytes), with
/// the tile locked.
template <typename Visit>
void TokenRows::for_each_tile(const Block& block, const Visit& visit) {
  std::size_t at = 0;
  for (std::int64_t token = block.tokens.begin; token < block.tokens.end;) {
    const Tile tile = tile_of(block.batch, token);
    const Range tokens{token, std::min(tile.tokens.end, block.tokens.end)};
    const std::size_t bytes = to_size(tokens.size()) * row_bytes(block.heads);
    {
      const std::scoped_lock lock(tile_locks_[tile.number % tile_locks_.size()]);
      visit(tile, Block{block.batch, tokens, block.heads}, at, bytes);
    }
    at += bytes;
    token = tokens.end;
  }
}

void TokenRows::write(const Block& block, std::span<const std::byte> from) {
  const bool whole_rows = block.heads.size() == desc_.heads;
  if (staged_.empty() && whole_rows) return write_rows(block, from);  // nobody else's rows
  for_each_tile(block, [&](const Tile& tile, const Block& part, std::size_t at, std::size_t bytes) {
    write_part(tile, part, from.subspan(at, bytes));
  });
}

void TokenRows::read(const Block& block, std::span<std::byte> into) {
  for_each_tile(block, [&](const Tile& tile, const Block& part, std::size_t at, std::size_t bytes) {
    const std::span<std::byte> rows = into.subspan(at, bytes);
    if (staged_.empty() || staged_[tile.number] <= 0) return read_rows(part, rows);
    read_heads(vectors_, staged_order(tile), part.tokens, part.heads, rows, buffers_);
  });
}

void TokenRows::write_part(const Tile& tile, const Block& part, std::span<const std::byte> from) {
  if (staged_.empty() || staged_[tile.number] == in_rows) return write_rows(part, from);
  std::int64_t& staged = staged_[tile.number];
  const bool whole_rows = part.heads.size() == desc_.heads;
  if (staged == 0 && (whole_rows || row_bytes(part.heads) >= shortest_write)) {
    write_rows(part, from);
    staged = in_rows;
  } else if (staged + part.vectors() < tile.tokens.size() * desc_.heads) {
    write_heads(vectors_, staged_order(tile), part.tokens, part.heads, from, buffers_);
    staged += part.vectors();
  } else {
    put_into_rows(tile, part, from);
    staged = in_rows;
  }
}

void TokenRows::finish() {
  if (staged_.empty()) return;
  for (std::int64_t batch = 0; batch < desc_.batch; ++batch) {
    for (std::int64_t token = 0; token < desc_.tokens; token += tile_tokens_) {
      const Tile tile = tile_of(batch, token);
      if (staged_[tile.number] > 0) put_into_rows(tile, {batch, {token, token}, {0, 0}}, {});
      staged_[tile.number] = in_rows;
    }
  }
}

/// Puts a staged tile into rows, with a part of it that is not there yet.
void TokenRows::put_into_rows(const Tile& tile, const Block& part,
                              std::span<const std::byte> from) {
  const std::int64_t tokens = tile.tokens.size();
  const std::size_t bytes = vectors_.bytes;
  const std::size_t row = row_bytes({0, desc_.heads});
  BufferPool::Lease staged_buffer = buffers_.take();
  BufferPool::Lease row_buffer = buffers_.take();
  const std::span<std::byte> staged = staged_buffer.first(to_size(tokens) * row);
  const std::span<std::byte> rows = row_buffer.first(staged.size());
  const std::int64_t first = vector_index(desc_, tile.batch, tile.tokens.begin, 0);
  vectors_.read(first, staged);
  for (std::int64_t head = 0; head < desc_.heads; ++head) {
    copy_strided(rows.data() + to_size(head) * bytes, row,
                 staged.data() + to_size(head * tokens) * bytes, bytes, tokens, bytes);
  }
  const std::size_t first_row = to_size(part.tokens.begin - tile.tokens.begin);
  const std::size_t part_bytes = row_bytes(part.heads);
  copy_strided(rows.data() + first_row * row + to_size(part.heads.begin) * bytes, row, from.data(),
               part_bytes, part.tokens.size(), part_bytes);
  vectors_.write(first, rows);
}

// --- rows ---

void TokenRows::write_rows(const Block& part, std::span<const std::byte> from) {
  if (part.heads.size() == desc_.heads || part.tokens.size() == 1) {
    vectors_.write(vector_index(desc_, part.batch, part.tokens.begin, part.heads.begin), from);
  } else if (row_bytes(part.heads) >= shortest_write) {
    write_by_token(part, from);
  } else {
    overlay(part, from);
  }
}

/// Each token's part of its row is written where it belongs.
void TokenRows::write_by_token(const Block& part, std::span<const std::byte> from) {
  const std::size_t part_bytes = row_bytes(part.heads);
  for (std::int64_t token = part.tokens.begin; token < part.tokens.end; ++token) {
    vectors_.write(vector_index(desc_, part.batch, token, part.heads.begin),
                   from.first(part_bytes));
    from = from.subspan(part_bytes);
  }
}

/// Whole rows are read, changed and written back, since many short writes cost far more than the
/// bytes that are moved twice.
void TokenRows::overlay(const Block& part, std::span<const std::byte> from) {
  const std::size_t row = row_bytes({0, desc_.heads});
  const std::size_t part_bytes = row_bytes(part.heads);
  const std::int64_t first = vector_index(desc_, part.batch, part.tokens.begin, 0);
  BufferPool::Lease buffer = buffers_.take();
  const std::span<std::byte> rows = buffer.first(to_size(part.tokens.size()) * row);
  vectors_.read(first, rows);
  copy_strided(rows.data() + to_size(part.heads.begin) * vectors_.bytes, row, from.data(),
               part_bytes, part.tokens.size(), part_bytes);
  vectors_.write(first, rows);
}

/// One long read of whole rows costs less than many short ones.
void TokenRows::read_rows(const Block& part, std::span<std::byte> into) {
  const std::size_t row = row_bytes({0, desc_.heads});
  const std::size_t part_bytes = row_bytes(part.heads);
  const std::int64_t first = vector_index(desc_, part.batch, part.tokens.begin, 0);
  if (part_bytes == row) return vectors_.read(first, into);
  BufferPool::Lease buffer = buffers_.take();
  const std::span<std::byte> rows = buffer.first(to_size(part.tokens.size()) * row);
  vectors_.read(first, rows);
  copy_strided(into.data(), part_bytes, rows.data() + to_size(part.heads.begin) * vectors_.bytes,
               row, part.tokens.size(), part_bytes);
}

}  // namespace stream_cqsa
