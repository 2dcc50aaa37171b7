// Checks that divisions, and divisions of their quorums' work, give every score exactly once.
#pragma once

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <utility>
#include <vector>

#include "stream_cqsa/divide.hpp"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define STREAM_CQSA_TEST_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define STREAM_CQSA_TEST_SANITIZED
#endif
#endif

namespace stream_cqsa::testing {

// Under a sanitizer, which slows these loops tenfold, the exhaustive ones take every seventh c.
#ifdef STREAM_CQSA_TEST_SANITIZED
inline constexpr std::int64_t stride = 7;
#else
inline constexpr std::int64_t stride = 1;
#endif

// Work that is divided again takes longest: every c with STREAM_CQSA_THOROUGH=1, as in CI, else
// every tenth.
inline bool thorough() { return std::getenv("STREAM_CQSA_THOROUGH") != nullptr; }
inline std::int64_t deep_stride() {
  return thorough() ? stride : std::max(stride, std::int64_t{10});
}

using IndexPair = std::pair<std::int64_t, std::int64_t>;

inline Problem make_problem(std::int64_t query_length, std::int64_t key_length, Mask mask) {
  Problem problem;
  problem.query_length = query_length;
  problem.key_length = key_length;
  problem.head_dim = 1;
  problem.mask = mask;
  return problem;
}

// Counts how often each single score is computed and checks every piece of work on its own,
// straight from the mask's definition.
class ScoreCounter {
 public:
  explicit ScoreCounter(const Problem& problem)
      : problem_(problem), counts_(problem.query_length * problem.key_length, 0) {}

  void add(const QuorumWork& work) {
    check_chunks(work);
    for (std::size_t i = 0; i < work.pairs.size(); ++i) {
      const ChunkPair& pair = work.pairs[i];
      if (i > 0 && !before(work.pairs[i - 1], pair)) ++errors_;
      add_block(work.chunks[pair.query].queries, work.chunks[pair.key].keys, pair.liveness);
    }
  }

  // The number of broken promises so far, and of scores not computed exactly once.
  std::int64_t errors() const {
    std::int64_t errors = errors_;
    for (std::int64_t i = 0; i < problem_.query_length; ++i) {
      for (std::int64_t j = 0; j < problem_.key_length; ++j) {
        errors += counts_[i * problem_.key_length + j] != (visible(i, j) ? 1 : 0);
      }
    }
    return errors;
  }

  std::int64_t scores() const { return scores_; }

 private:
  bool visible(std::int64_t i, std::int64_t j) const {
    const std::int64_t row = problem_.queries_before + i;
    const std::int64_t rows =
        problem_.queries_before + problem_.query_length + problem_.queries_after;
    return problem_.mask == Mask::none || j <= row + problem_.key_length - rows;
  }

  static bool before(const ChunkPair& x, const ChunkPair& y) {
    return x.query < y.query || (x.query == y.query && x.key < y.key);
  }

  void check_chunks(const QuorumWork& work) {
    std::vector<bool> needed(work.chunks.size(), false);
    for (const ChunkPair& pair : work.pairs) needed.at(pair.query) = needed.at(pair.key) = true;
    errors_ += std::count(needed.begin(), needed.end(), false);
    for (std::size_t i = 1; i < work.chunks.size(); ++i) {
      const Chunk& low = work.chunks[i - 1];
      const Chunk& high = work.chunks[i];
      errors_ += !(low.index <= high.index && low.queries.end <= high.queries.begin &&
                   low.keys.end <= high.keys.begin && !(low == high));
    }
  }

  void add_block(Range queries, Range keys, Liveness liveness) {
    std::int64_t live = 0;
    for (std::int64_t i = queries.begin; i < queries.end; ++i) {
      for (std::int64_t j = keys.begin; j < keys.end; ++j) {
        if (!visible(i, j)) continue;
        ++live;
        ++counts_[i * problem_.key_length + j];
      }
    }
    scores_ += live;
    const bool full = live == queries.size() * keys.size();
    errors_ += live == 0 || liveness != (full ? Liveness::full : Liveness::partial);
  }

  Problem problem_;
  std::vector<std::uint8_t> counts_;  // [query][key]
  std::int64_t scores_ = 0;
  std::int64_t errors_ = 0;
};

// Adds `work` divided again once for every entry of `parts`, each piece by the next entry.
inline void add_divided(ScoreCounter& counter, const Problem& problem, const QuorumWork& work,
                        std::span<const std::int64_t> parts, std::int64_t tile) {
  if (parts.empty()) return counter.add(work);
  for (const QuorumWork& piece : divide_again(problem, work, parts.front(), tile)) {
    add_divided(counter, problem, piece, parts.subspan(1), tile);
  }
}

inline void check_exactly_once(const Problem& problem, const Division& division,
                               const std::vector<std::int64_t>& parts) {
  ScoreCounter counter(problem);
  for (std::int64_t i = 0; i < division.quorum_count(); ++i) {
    add_divided(counter, problem, division.work(i), parts, division.tile());
  }
  BOOST_TEST_CONTEXT(division.quorum_count()
                     << " quorums of " << division.chunk_count() << " chunks, Nq "
                     << problem.query_length << ", Nk " << problem.key_length << ", tile "
                     << division.tile() << ", depth " << parts.size() << ", causal "
                     << (problem.mask == Mask::causal)) {
    BOOST_REQUIRE_EQUAL(counter.errors(), 0);
    BOOST_REQUIRE_EQUAL(counter.scores(),
                        problem.live_scores({0, problem.query_length}, {0, problem.key_length}));
  }
}

inline void check_exactly_once(const Problem& problem, std::int64_t c, std::int64_t tile,
                               const std::vector<std::int64_t>& parts) {
  check_exactly_once(problem, Division(problem, c, tile), parts);
}

inline void check_both_masks(std::int64_t nq, std::int64_t nk, std::int64_t c, std::int64_t tile,
                             const std::vector<std::int64_t>& parts = {}) {
  for (const Mask mask : {Mask::none, Mask::causal}) {
    check_exactly_once(make_problem(nq, nk, mask), c, tile, parts);
  }
}

// More tokens per chunk for the smaller c, so that partial pairs have many shapes.
inline std::int64_t tokens_for(std::int64_t c, std::int64_t parts) {
  const std::int64_t per_part = c <= 20 ? 4 : c <= 60 ? 2 : 1;
  return c * parts * per_part + c / 3;
}

}  // namespace stream_cqsa::testing
