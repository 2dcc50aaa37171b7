#include "cpu/attention_kernel.hpp"

#include <cblas.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numbers>

#include "cpu/row_ops.hpp"

namespace stream_cqsa {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// c = a b^T (+ c): a [rows][depth], b [columns][depth].
void multiply_transposed(const float* a, const float* b, std::int64_t b_stride, float* c,
                         std::int64_t c_stride, std::int64_t rows, std::int64_t columns,
                         std::int64_t depth) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(rows),
              static_cast<int>(columns), static_cast<int>(depth), 1.0f, a, static_cast<int>(depth),
              b, static_cast<int>(b_stride), 0.0f, c, static_cast<int>(c_stride));
}

// c = a b + beta c: a [rows][depth], b [depth][columns], c [rows][columns].
void multiply_add(const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride,
                  float beta, float* c, std::int64_t rows, std::int64_t columns,
                  std::int64_t depth) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, static_cast<int>(rows),
              static_cast<int>(columns), static_cast<int>(depth), 1.0f, a,
              static_cast<int>(a_stride), b, static_cast<int>(b_stride), beta, c,
              static_cast<int>(columns));
}

// One past the last key that the rows of `tokens` compute of `keys`.
std::int64_t key_end(const Problem& problem, Range tokens, Range keys, bool partial) {
  if (!partial) return keys.end;
  const std::int64_t visible = std::max<std::int64_t>(problem.visible_keys(tokens.end - 1), 0);
  return std::clamp(round_up(visible, KernelShape::mask_keys), keys.begin, keys.end);
}

// The part of `tokens` that begins at `begin` and lies in one mask tile.
Range mask_part(Range tokens, std::int64_t begin) {
  const std::int64_t next =
      begin / KernelShape::mask_tokens * KernelShape::mask_tokens + KernelShape::mask_tokens;
  return {begin, std::min(next, tokens.end)};
}

// A block of keys as fp32. Vectors are `stride` elements apart.
struct KeyBlock {
  const float* key;
  const float* value;
  std::int64_t stride;
  Range keys;
};

class TileComputation {
 public:
  TileComputation(const Problem& problem, const KernelTile& tile, const KernelScratch& scratch,
                  const std::atomic<bool>* cancelled)
      : problem_(problem), tile_(tile), scratch_(scratch), cancelled_(cancelled) {}

  void run() {
    load_query();
    std::fill_n(scratch_.m, tile_.rows(), -infinity);
    std::fill_n(scratch_.l, tile_.rows(), 0.0f);
    std::fill_n(scratch_.acc, tile_.rows() * problem_.head_dim, 0.0f);
    for (auto keys = tile_.first_key; keys != tile_.last_key; ++keys) add_chunk(*keys);
    store_states();
  }

 private:
  std::int64_t dim() const { return problem_.head_dim; }
  std::int64_t vector_bytes() const { return dim() * size_of(type()); }
  DType type() const { return storage_type(problem_.dtype); }
  std::int64_t row_of(std::int64_t token) const {
    return (token - tile_.tokens.begin) * tile_.heads;
  }

  void load_query() {
    // Scores in base 2 straight from the product.
    const auto scale = static_cast<float>(problem_.scale * std::numbers::log2e);
    for (std::int64_t token = tile_.tokens.begin; token < tile_.tokens.end; ++token) {
      const std::int64_t vector =
          (token - tile_.queries.begin) * tile_.group_heads + tile_.first_head;
      row_ops::load(type(), tile_.query + vector * vector_bytes(), vector_bytes(), tile_.heads,
                    dim(), scale, scratch_.query + row_of(token) * dim());
    }
  }

  void add_chunk(const KernelKeys& chunk) {
    const std::int64_t end = key_end(problem_, tile_.tokens, chunk.keys, chunk.partial);
    for (std::int64_t key = chunk.keys.begin; key < end; key += KernelShape::key_block) {
      if (cancelled_ && cancelled_->load(std::memory_order_relaxed)) return;
      const Range keys{key, std::min(key + KernelShape::key_block, end)};
      const KeyBlock block = load_block(chunk, keys);
      const bool hidden = chunk.partial && problem_.visible_keys(tile_.tokens.begin) < keys.end;
      if (hidden) {
        add_masked_block(block);
      } else {
        add_block(block, tile_.tokens);
      }
    }
  }

  KeyBlock load_block(const KernelKeys& chunk, Range keys) {
    const std::int64_t stride = tile_.group_kv_heads * vector_bytes();
    const std::int64_t offset =
        (keys.begin - chunk.keys.begin) * stride + tile_.kv_head * vector_bytes();
    if (type() == DType::f32) {
      return {reinterpret_cast<const float*>(chunk.key + offset),
              reinterpret_cast<const float*>(chunk.value + offset), tile_.group_kv_heads * dim(),
              keys};
    }
    row_ops::load(type(), chunk.key + offset, stride, keys.size(), dim(), 1.0f, scratch_.key);
    row_ops::load(type(), chunk.value + offset, stride, keys.size(), dim(), 1.0f, scratch_.value);
    return {scratch_.key, scratch_.value, dim(), keys};
  }

  // A block that every row of `tokens` sees whole.
  void add_block(const KeyBlock& block, Range tokens) {
    const std::int64_t first = row_of(tokens.begin);
    const std::int64_t rows = tokens.size() * tile_.heads;
    const std::int64_t keys = block.keys.size();
    float* scores = scratch_.scores;
    multiply_transposed(scratch_.query + first * dim(), block.key, block.stride, scores,
                        KernelShape::score_stride, rows, keys, dim());
    update_softmax(first, rows, keys);
    multiply_add(scores, KernelShape::score_stride, block.value, block.stride, 1.0f,
                 scratch_.acc + first * dim(), rows, dim(), keys);
  }

  void update_softmax(std::int64_t first, std::int64_t rows, std::int64_t keys) {
    row_ops::softmax(scratch_.scores, KernelShape::score_stride, rows, keys, scratch_.m + first,
                     scratch_.l + first, scratch_.rescale + first);
    row_ops::scale(scratch_.acc + first * dim(), rows, dim(), scratch_.rescale + first);
  }

  // A block of which the mask hides something: each mask tile of rows ends where it must.
  void add_masked_block(const KeyBlock& whole) {
    for (Range part = mask_part(tile_.tokens, tile_.tokens.begin); !part.empty();
         part = mask_part(tile_.tokens, part.end)) {
      KeyBlock block = whole;
      block.keys.end = key_end(problem_, part, whole.keys, true);
      if (block.keys.empty()) continue;
      if (problem_.visible_keys(part.begin) >= block.keys.end) {
        add_block(block, part);
      } else {
        add_masked_rows(block, part);
      }
    }
  }

  void add_masked_rows(const KeyBlock& block, Range tokens) {
    const std::int64_t first = row_of(tokens.begin);
    const std::int64_t rows = tokens.size() * tile_.heads;
    const std::int64_t keys = block.keys.size();
    multiply_transposed(scratch_.query + first * dim(), block.key, block.stride, scratch_.scores,
                        KernelShape::score_stride, rows, keys, dim());
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t seen = seen_keys(tokens, row, block.keys);
      float* scores = scratch_.scores + row * KernelShape::score_stride;
      std::fill(scores + seen, scores + keys, -infinity);
    }
    update_softmax(first, rows, keys);
    if (row_ops::all_finite(block.value, block.stride, keys, dim())) {
      multiply_add(scratch_.scores, KernelShape::score_stride, block.value, block.stride, 1.0f,
                   scratch_.acc + first * dim(), rows, dim(), keys);
    } else {
      add_seen_values(block, tokens);
    }
  }

  // Keys of `keys` that row `row` of `tokens` sees.
  std::int64_t seen_keys(Range tokens, std::int64_t row, Range keys) const {
    const std::int64_t visible = problem_.visible_keys(tokens.begin + row / tile_.heads);
    return std::clamp<std::int64_t>(visible - keys.begin, 0, keys.size());
  }

  // acc += P V over the keys that each row sees: weight 0 times an infinite value would be NaN.
  void add_seen_values(const KeyBlock& block, Range tokens) {
    const std::int64_t rows = tokens.size() * tile_.heads;
    float* acc = scratch_.acc + row_of(tokens.begin) * dim();
    for (std::int64_t row = 0; row < rows; ++row, acc += dim()) {
      const std::int64_t seen = seen_keys(tokens, row, block.keys);
      const float* weights = scratch_.scores + row * KernelShape::score_stride;
      for (std::int64_t key = 0; key < seen; ++key) {
        const float* value = block.value + key * block.stride;
        for (std::int64_t i = 0; i < dim(); ++i) acc[i] += weights[key] * value[i];
      }
    }
  }

  void store_states() const {
    for (std::int64_t token = tile_.tokens.begin; token < tile_.tokens.end; ++token) {
      const std::int64_t from = row_of(token);
      const std::int64_t to = (token - tile_.queries.begin) * tile_.group_heads + tile_.first_head;
      std::copy_n(scratch_.acc + from * dim(), tile_.heads * dim(), tile_.states.acc + to * dim());
      std::copy_n(scratch_.m + from, tile_.heads, tile_.states.m + to);
      std::copy_n(scratch_.l + from, tile_.heads, tile_.states.l + to);
    }
  }

  const Problem& problem_;
  const KernelTile& tile_;
  const KernelScratch& scratch_;
  const std::atomic<bool>* cancelled_;
};

constexpr std::int64_t scratch_alignment = 64;

std::int64_t aligned_bytes(std::int64_t floats) {
  return round_up(floats * static_cast<std::int64_t>(sizeof(float)), scratch_alignment);
}

}  // namespace

KernelShape::KernelShape(const Problem& problem) {
  heads = std::min(problem.query_heads_per_kv_head(), max_rows);
  tokens = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(max_rows / heads)));
}

std::int64_t KernelScratch::bytes(const Problem& problem) {
  const std::int64_t dim = problem.head_dim;
  return 2 * aligned_bytes(KernelShape::max_rows * dim) +
         2 * aligned_bytes(KernelShape::key_block * dim) +
         aligned_bytes(KernelShape::max_rows * KernelShape::score_stride) +
         3 * aligned_bytes(KernelShape::max_rows);
}

KernelScratch::KernelScratch(std::byte* memory, const Problem& problem) {
  const auto carve = [&memory](std::int64_t floats) {
    auto* part = reinterpret_cast<float*>(memory);
    memory += aligned_bytes(floats);
    return part;
  };
  query = carve(KernelShape::max_rows * problem.head_dim);
  acc = carve(KernelShape::max_rows * problem.head_dim);
  key = carve(KernelShape::key_block * problem.head_dim);
  value = carve(KernelShape::key_block * problem.head_dim);
  scores = carve(KernelShape::max_rows * KernelShape::score_stride);
  m = carve(KernelShape::max_rows);
  l = carve(KernelShape::max_rows);
  rescale = carve(KernelShape::max_rows);
}

std::int64_t score_count(const Problem& problem, const KernelTile& tile) {
  std::int64_t count = 0;
  for (Range part = mask_part(tile.tokens, tile.tokens.begin); !part.empty();
       part = mask_part(tile.tokens, part.end)) {
    for (auto keys = tile.first_key; keys != tile.last_key; ++keys) {
      const std::int64_t end = key_end(problem, part, keys->keys, keys->partial);
      count += part.size() * tile.heads * (end - keys->keys.begin);
    }
  }
  return count;
}

void compute_tile(const Problem& problem, const KernelTile& tile, const KernelScratch& scratch,
                  const std::atomic<bool>* cancelled) {
  TileComputation(problem, tile, scratch, cancelled).run();
}

}  // namespace stream_cqsa
