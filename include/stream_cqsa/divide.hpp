// CQS Divide: the sequence cut by cyclic quorum sets into subproblems that cover every chunk pair
// exactly once (Stream-CQSA, arXiv 2604.20819, section 3).
#pragma once

#include <cstdint>
#include <span>
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

/// The sequence cut into c chunks and c quorums.
///
/// Quorum i holds the chunks { i + a mod c : a in A } and is responsible for the pairs
/// (i + a, i + b), one (a, b) = r(d) for every difference d. The pair (p, q) has d = q - p, so it
/// belongs to quorum p - a with (a, b) = r(d), and to no other.
///
/// Example: c = 7, A = {0, 1, 3}. Quorum 2 holds the chunks 2, 3, 5 and computes
/// (2,2) (2,3) (3,2) (2,5) (5,2) (3,5) (5,3).
class Division {
 public:
  /// Cuts problem.query_length and problem.key_length into c chunks on multiples of `tile` tokens.
  /// Throws InputError unless 1 <= c <= max_modulus and tile >= 1.
  Division(const Problem& problem, std::int64_t c, std::int64_t tile);

  std::int64_t chunk_count() const { return cover_.modulus; }  ///< c
  std::int64_t quorum_size() const { return cover_.size(); }   ///< k
  std::int64_t tile() const { return tile_; }
  const DifferenceCover& cover() const { return cover_; }
  /// r(d), indexed by d in [0, c). r(0) = (0, 0); r(-d) is r(d) swapped wherever d != -d.
  std::span<const Responsibility> responsibilities() const { return responsibilities_; }

  Chunk chunk(std::int64_t index) const;

  /// The chunks of quorum i in the cover's order: chunk i + residues[position] mod c.
  std::int64_t chunk_of(std::int64_t quorum, std::int64_t position) const {
    return (quorum + cover_.residues[position]) % cover_.modulus;
  }

  /// The quorum that is responsible for the pair (query chunk p, key chunk q).
  std::int64_t owner(std::int64_t p, std::int64_t q) const;

  /// The live work of quorum i, generated in O(c log c).
  QuorumWork work(std::int64_t quorum) const;

  /// The quorums with a live pair whose query (key) chunk is p, ascending.
  /// quorums_of_query(p) is the canonical merge order of query chunk p.
  std::vector<std::int64_t> quorums_of_query(std::int64_t p) const;
  std::vector<std::int64_t> quorums_of_key(std::int64_t p) const;

 private:
  Problem problem_;
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
