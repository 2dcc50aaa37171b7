#include "stream_cqsa/divide.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

// A live pair by chunk index, before the chunks that a piece of work needs are known.
struct IndexPair {
  std::int32_t query = 0;
  std::int32_t key = 0;
  Liveness liveness = Liveness::full;
};

// value mod modulus, for -modulus <= value < modulus.
std::int64_t modulo(std::int64_t value, std::int64_t modulus) {
  return value < 0 ? value + modulus : value;
}

void require_tile(std::int64_t tile) {
  if (tile < 1) throw InputError(fmt::format("a tile of {} tokens; it must be at least 1", tile));
}

// r(d) is the first (a, b) in lexicographic order of positions with difference d or -d.
std::vector<Responsibility> choose_responsibilities(const DifferenceCover& cover) {
  const std::int64_t c = cover.modulus;
  std::vector<Responsibility> result(c);  // r(0) = (0, 0) is the default
  std::vector<bool> chosen(c, false);
  const auto k = static_cast<std::int32_t>(cover.size());
  for (std::int32_t a = 0; a < k; ++a) {
    for (std::int32_t b = a + 1; b < k; ++b) {
      const std::int64_t d = cover.residues[b] - cover.residues[a];
      if (chosen[d]) continue;
      // Where d = -d only one order may stand: two would compute the pair twice.
      result[c - d] = {b, a};
      result[d] = {a, b};
      chosen[d] = chosen[c - d] = true;
    }
  }
  return result;
}

// Orders the pairs and gathers the chunks they need; `chunk_at(index)` makes a chunk, and chunks
// ascend by token when they ascend by index.
template <typename ChunkAt>
QuorumWork gather(std::vector<IndexPair> pairs, const ChunkAt& chunk_at) {
  std::sort(pairs.begin(), pairs.end(), [](const IndexPair& x, const IndexPair& y) {
    return std::tie(x.query, x.key) < std::tie(y.query, y.key);
  });
  std::vector<std::int32_t> needed;
  needed.reserve(2 * pairs.size());
  for (const IndexPair& pair : pairs) {
    needed.push_back(pair.query);
    needed.push_back(pair.key);
  }
  std::sort(needed.begin(), needed.end());
  needed.erase(std::unique(needed.begin(), needed.end()), needed.end());
  const auto position = [&](std::int32_t index) {
    return static_cast<std::int32_t>(std::lower_bound(needed.begin(), needed.end(), index) -
                                     needed.begin());
  };

  QuorumWork work;
  work.chunks.reserve(needed.size());
  for (const std::int32_t index : needed) work.chunks.push_back(chunk_at(index));
  work.pairs.reserve(pairs.size());
  for (const IndexPair& pair : pairs) {
    work.pairs.push_back({position(pair.query), position(pair.key), pair.liveness});
  }
  return work;
}

// The quorums in which chunk p lies at a position with a live difference, ascending.
template <typename IsLive>
std::vector<std::int64_t> live_quorums(const DifferenceCover& cover,
                                       const std::vector<std::vector<std::int32_t>>& differences,
                                       std::int64_t p, const IsLive& is_live) {
  std::vector<std::int64_t> result;
  for (std::size_t position = 0; position < differences.size(); ++position) {
    if (std::any_of(differences[position].begin(), differences[position].end(), is_live)) {
      result.push_back(modulo(p - cover.residues[position], cover.modulus));
    }
  }
  std::sort(result.begin(), result.end());
  return result;
}

// The first of 0 .. count - 1 that `is_before` no longer holds for, or count.
template <typename IsBefore>
std::int64_t first_behind(std::int64_t count, const IsBefore& is_before) {
  std::int64_t low = 0;
  while (low < count) {
    const std::int64_t middle = low + (count - low) / 2;
    if (is_before(middle)) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// Part `index` of those that have tokens; behind them empty ones.
Range split_used(std::int64_t length, std::int64_t tile, std::int64_t used, std::int64_t index) {
  return index < used ? split(length, tile, used, index) : Range{length, length};
}

Range split_range(Range whole, std::int64_t tile, std::int64_t parts, std::int64_t index) {
  const Range part = split(whole.size(), tile, parts, index);
  return {whole.begin + part.begin, whole.begin + part.end};
}

std::vector<Chunk> cut(const std::vector<Chunk>& chunks, std::int64_t parts, std::int64_t tile) {
  std::vector<Chunk> result;
  result.reserve(chunks.size() * parts);
  for (const Chunk& chunk : chunks) {
    for (std::int64_t part = 0; part < parts; ++part) {
      result.push_back({chunk.index, split_range(chunk.queries, tile, parts, part),
                        split_range(chunk.keys, tile, parts, part)});
    }
  }
  return result;
}

}  // namespace

std::string_view name_of(Scheme scheme) { return scheme == Scheme::tiles ? "tiles" : "cqs"; }

std::optional<Scheme> parse_scheme(std::string_view name) {
  for (const Scheme scheme : {Scheme::cqs, Scheme::tiles}) {
    if (name == name_of(scheme)) return scheme;
  }
  return std::nullopt;
}

Division::Division(const Problem& problem, std::int64_t c, std::int64_t tile)
    : problem_(problem),
      cover_(difference_cover(c)),
      responsibilities_(choose_responsibilities(cover_)),
      by_query_(cover_.size()),
      by_key_(cover_.size()),
      tile_(tile) {
  require_tile(tile);
  for (std::int32_t d = 0; d < c; ++d) {
    by_query_[responsibilities_[d].query].push_back(d);
    by_key_[responsibilities_[d].key].push_back(d);
  }
}

Division::Division(const Problem& problem, const Grid& grid, std::int64_t tile)
    : problem_(problem), grid_(grid), cover_{0, {}}, tile_(tile) {
  require_tile(tile);
  if (std::min(grid.rows, grid.columns) < 1 || std::max(grid.rows, grid.columns) > max_modulus) {
    throw InputError(
        fmt::format("a grid of {}x{} tiles; from 1 to {} rows and columns are supported", grid.rows,
                    grid.columns, max_modulus));
  }
  used_rows_ = std::min(grid.rows, ceil_div(problem.query_length, tile));
  used_columns_ = std::min(grid.columns, ceil_div(problem.key_length, tile));
}

Range Division::live_columns(std::int64_t row) const {
  const Range queries = chunk(row).queries;
  return {0, first_behind(used_columns_, [&](std::int64_t column) {
            return problem_.liveness(queries, chunk(column).keys) != Liveness::dead;
          })};
}

Range Division::live_rows(std::int64_t column) const {
  const Range keys = chunk(column).keys;
  const std::int64_t first = first_behind(used_rows_, [&](std::int64_t row) {
    return problem_.liveness(chunk(row).queries, keys) == Liveness::dead;
  });
  return {first, used_rows_};
}

Chunk Division::chunk(std::int64_t index) const {
  if (grid_) {
    return {index, split_used(problem_.query_length, tile_, used_rows_, index),
            split_used(problem_.key_length, tile_, used_columns_, index)};
  }
  const std::int64_t c = chunk_count();
  return {index, split(problem_.query_length, tile_, c, index),
          split(problem_.key_length, tile_, c, index)};
}

std::int64_t Division::owner(std::int64_t p, std::int64_t q) const {
  if (grid_) return p * grid_->columns + q;
  const std::int64_t d = modulo(q - p, chunk_count());
  return modulo(p - cover_.residues[responsibilities_[d].query], chunk_count());
}

QuorumWork Division::work(std::int64_t quorum) const {
  std::vector<IndexPair> pairs;
  const auto chunk_at = [this](std::int32_t index) { return chunk(index); };
  if (grid_) {
    const std::int64_t row = quorum / grid_->columns, column = quorum % grid_->columns;
    const Liveness liveness = problem_.liveness(chunk(row).queries, chunk(column).keys);
    if (liveness == Liveness::dead) return {};
    pairs.push_back({static_cast<std::int32_t>(row), static_cast<std::int32_t>(column), liveness});
    return gather(std::move(pairs), chunk_at);
  }
  std::vector<Chunk> chunks;  // in the cover's order
  for (std::int64_t position = 0; position < quorum_size(); ++position) {
    chunks.push_back(chunk(chunk_of(quorum, position)));
  }
  for (const Responsibility& r : responsibilities_) {
    const Chunk& query = chunks[r.query];
    const Chunk& key = chunks[r.key];
    const Liveness liveness = problem_.liveness(query.queries, key.keys);
    if (liveness == Liveness::dead) continue;
    pairs.push_back(
        {static_cast<std::int32_t>(query.index), static_cast<std::int32_t>(key.index), liveness});
  }
  return gather(std::move(pairs), chunk_at);
}

std::vector<std::int64_t> Division::quorums_of_query(std::int64_t p) const {
  if (grid_) {
    std::vector<std::int64_t> result(static_cast<std::size_t>(live_columns(p).size()));
    std::iota(result.begin(), result.end(), owner(p, 0));
    return result;
  }
  const Range queries = chunk(p).queries;
  return live_quorums(cover_, by_query_, p, [&](std::int64_t d) {
    const Range keys = chunk((p + d) % chunk_count()).keys;
    return problem_.liveness(queries, keys) != Liveness::dead;
  });
}

std::vector<std::int64_t> Division::quorums_of_key(std::int64_t p) const {
  if (grid_) {
    std::vector<std::int64_t> result;
    const Range rows = live_rows(p);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) result.push_back(owner(row, p));
    return result;
  }
  const Range keys = chunk(p).keys;
  return live_quorums(cover_, by_key_, p, [&](std::int64_t d) {
    const Range queries = chunk(modulo(p - d, chunk_count())).queries;
    return problem_.liveness(queries, keys) != Liveness::dead;
  });
}

std::vector<QuorumWork> divide_again(const Problem& problem, const QuorumWork& work,
                                     std::int64_t parts, std::int64_t tile) {
  require_tile(tile);
  const auto chunk_count = static_cast<std::int64_t>(work.chunks.size());
  if (parts < 1 || parts > max_modulus || chunk_count * parts > max_modulus) {
    throw InputError(fmt::format(
        "cannot cut {} chunks into {} parts each; from 1 to {} parts in all are supported",
        chunk_count, parts, max_modulus));
  }
  if (work.pairs.empty()) return {};

  const std::int64_t c = chunk_count * parts;
  const DifferenceCover cover = difference_cover(c);
  const std::vector<Responsibility> responsibilities = choose_responsibilities(cover);
  const std::vector<Chunk> chunks = cut(work.chunks, parts, tile);
  std::vector<std::vector<IndexPair>> pairs_of(c);
  const auto assign = [&](std::int64_t p, std::int64_t q) {
    const Liveness liveness = problem.liveness(chunks[p].queries, chunks[q].keys);
    if (liveness == Liveness::dead) return;
    const Responsibility r = responsibilities[modulo(q - p, c)];
    pairs_of[modulo(p - cover.residues[r.query], c)].push_back(
        {static_cast<std::int32_t>(p), static_cast<std::int32_t>(q), liveness});
  };
  for (const ChunkPair& pair : work.pairs) {
    for (std::int64_t x = 0; x < parts; ++x) {
      for (std::int64_t y = 0; y < parts; ++y) assign(pair.query * parts + x, pair.key * parts + y);
    }
  }

  std::vector<QuorumWork> result;
  for (std::vector<IndexPair>& pairs : pairs_of) {
    if (pairs.empty()) continue;
    result.push_back(gather(std::move(pairs), [&](std::int32_t index) { return chunks[index]; }));
  }
  return result;
}

}  // namespace stream_cqsa
