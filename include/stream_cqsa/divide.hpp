// CQS Divide: the sequence cut by cyclic quorum sets into subproblems that cover every chunk pair
// exactly once (Stream-CQSA, arXiv 2604.20819, section 3). Beside it rectangular tiles, which do so
// too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "stream_cqsa/difference_cover.hpp"
#include "stream_cqsa/problem.hpp"
#include "stream_cqsa/range.hpp"

namespace stream_cqsa {

/// Positions in the cover of the ordered pair r(d) = (a, b) that is chosen for d = b - a mod c.
struct Responsibility {
  std::int32_t query = 0;  ///< position of a in the cover
  std::int32_t key = 0;    ///< position of b in the cover
  friend bool operator==(const Responsibility&, const Responsibility&) = default;
};

/// One of the contiguous token ranges that a division works with.
struct Chunk {
  std::int64_t index = 0;  ///< of the plan's chunk that this is, or is a part of
  Range queries;           ///< rows of Q and O
  Range keys;              ///< rows of K and V
  friend bool operator==(const Chunk&, const Chunk&) = default;
};

/// All scores between one query chunk and one key chunk of a subproblem.
struct ChunkPair {
  std::int32_t query = 0;  ///< position in QuorumWork::chunks
  std::int32_t key = 0;    ///< position in QuorumWork::chunks
  Liveness liveness = Liveness::full;
  friend bool operator==(const ChunkPair&, const ChunkPair&) = default;
};

/// A quorum with its live responsibility. Chunks that no live pair needs are absent.
struct QuorumWork {
  std::vector<Chunk> chunks;     ///< ascending by token
  std::vector<ChunkPair> pairs;  ///< live ones only, ascending by (query, key)
};

enum class Scheme {
  cqs,    ///< cyclic quorum sets: c chunks, c quorums
  tiles,  ///< a grid of query chunks times key chunks: each pair by itself
};

/// "cqs" or "tiles", and back: nothing for another name.
std::string_view name_of(Scheme scheme);
std::optional<Scheme> parse_scheme(std::string_view name);

/// Query chunks times key chunks.
struct Grid {
  std::int64_t rows = 1;     ///< query chunks
  std::int64_t columns = 1;  ///< key chunks
  friend bool operator==(const Grid&, const Grid&) = default;
};

/// The sequence cut into c chunks and c quorums, or into a grid of tiles.
///
/// Quorum i holds the chunks { i + a mod c : a in A } and is responsible for the pairs
/// (i + a, i + b), one (a, b) = r(d) for every difference d. The pair (p, q) has d = q - p, so it
/// belongs to quorum p - a with (a, b) = r(d), and to no other.
///
/// Example: c = 7, A = {0, 1, 3}. Quorum 2 holds the chunks 2, 3, 5 and computes
/// (2,2) (2,3) (3,2) (2,5) (5,2) (3,5) (5,3).
///
/// With tiles, "quorum" i = row * columns + column holds the query chunk `row` and the key chunk
/// `column`, and is responsible for that pair alone. Chunk p is query chunk p and key chunk p: past
/// the last row (column) its queries (keys) are empty.
///
/// Example: 2 x 3 tiles. Quorum 4 computes (1,1), from the queries and the keys of chunk 1; quorum
/// 5 computes (1,2), from the queries of chunk 1 and the keys of chunk 2, which has no queries.
class Division {
 public:
  /// Cuts problem.query_length and problem.key_length into c chunks on multiples of `tile` tokens.
  /// Throws InputError unless 1 <= c <= max_modulus and tile >= 1.
  Division(const Problem& problem, std::int64_t c, std::int64_t tile);

  /// Tiles, on multiples of `tile` tokens. Where there are fewer of these than rows (columns), the
  /// last rows (columns) are empty. Throws InputError unless 1 <= rows, columns <= max_modulus and
  /// tile >= 1.
  Division(const Problem& problem, const Grid& grid, std::int64_t tile);

  Scheme scheme() const { return grid_ ? Scheme::tiles : Scheme::cqs; }
  /// c, or the larger of rows and columns.
  std::int64_t chunk_count() const {
    return grid_ ? std::max(grid_->rows, grid_->columns) : cover_.modulus;
  }
  /// Quorums: c, or rows * columns.
  std::int64_t quorum_count() const {
    return grid_ ? grid_->rows * grid_->columns : cover_.modulus;
  }
  /// Query chunks that a quorum may have, and as many key chunks: k, or 1.
  std::int64_t quorum_size() const { return grid_ ? 1 : cover_.size(); }
  /// Quorums that may have a query chunk in common: k, or columns.
  std::int64_t most_partials() const { return grid_ ? grid_->columns : cover_.size(); }
  std::int64_t tile() const { return tile_; }

  /// Of cyclic quorum sets alone; of tiles an empty one.
  const DifferenceCover& cover() const { return cover_; }
  /// r(d), indexed by d in [0, c). r(0) = (0, 0); r(-d) is r(d) swapped wherever d != -d.
  std::span<const Responsibility> responsibilities() const { return responsibilities_; }

  /// Of tiles alone.
  const Grid& grid() const { return grid_.value(); }
  /// The columns (rows) with a live pair in a row (column): the first (last) ones.
  Range live_columns(std::int64_t row) const;
  Range live_rows(std::int64_t column) const;

  Chunk chunk(std::int64_t index) const;

  /// Of cyclic quorum sets alone, the chunks of quorum i in the cover's order: chunk
  /// i + residues[position] mod c.
  std::int64_t chunk_of(std::int64_t quorum, std::int64_t position) const {
    return (quorum + cover_.residues[position]) % cover_.modulus;
  }
  /// The query chunks that quorum i may have, 0 <= position < quorum_size().
  std::int64_t query_chunk_of(std::int64_t quorum, std::int64_t position) const {
    return grid_ ? quorum / grid_->columns : chunk_of(quorum, position);
  }

  /// The quorum that is responsible for the pair (query chunk p, key chunk q).
  std::int64_t owner(std::int64_t p, std::int64_t q) const;

  /// The live work of quorum i, generated in O(c log c), or O(1) of tiles.
  QuorumWork work(std::int64_t quorum) const;

  /// The quorums with a live pair whose query (key) chunk is p, ascending.
  /// quorums_of_query(p) is the canonical merge order of query chunk p.
  std::vector<std::int64_t> quorums_of_query(std::int64_t p) const;
  std::vector<std::int64_t> quorums_of_key(std::int64_t p) const;

 private:
  Problem problem_;
  std::optional<Grid> grid_;                       ///< of tiles
  std::int64_t used_rows_ = 0, used_columns_ = 0;  ///< of the grid, that have tokens
  DifferenceCover cover_;
  std::vector<Responsibility> responsibilities_;
  // by_query_[position]: the differences d with r(d).query == position; by_key_ likewise.
  std::vector<std::vector<std::int32_t>> by_query_;
  std::vector<std::vector<std::int32_t>> by_key_;
  std::int64_t tile_ = 1;
};

/// Divides one quorum's work again: each of its chunks is cut into `parts` on multiples of `tile`,
/// the parts get a cover of their own, and each new piece of work keeps those part pairs whose
/// parents were a pair of `work`. Exactly-once is inherited. Pieces without a live pair vanish.
/// Chunk::index stays that of the plan's chunk. Throws InputError when chunks * parts exceeds
/// max_modulus.
std::vector<QuorumWork> divide_again(const Problem& problem, const QuorumWork& work,
                                     std::int64_t parts, std::int64_t tile);

}  // namespace stream_cqsa
