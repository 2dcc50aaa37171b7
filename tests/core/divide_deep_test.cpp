// Divisions of work divided again, and divisions with many chunks.
#define BOOST_TEST_MODULE divide_deep
#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <random>
#include <vector>

#include "core/exactly_once.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

// Every chunk divided `depth` times in two has parts of one token: each leaf pair is one score.
constexpr std::int64_t parts = 2;

void collect_scores(std::vector<IndexPair>& scores, const Problem& problem, const QuorumWork& work,
                    int depth) {
  if (depth > 0) {
    for (const QuorumWork& piece : divide_again(problem, work, parts, 1)) {
      collect_scores(scores, problem, piece, depth - 1);
    }
    return;
  }
  for (const ChunkPair& pair : work.pairs) {
    const Range queries = work.chunks[pair.query].queries;
    const Range keys = work.chunks[pair.key].keys;
    BOOST_REQUIRE(queries.size() == 1 && keys.size() == 1);
    scores.emplace_back(queries.begin, keys.begin);
  }
}

// The visible scores of the pairs that r gives to quorum i, straight from the definition.
std::vector<IndexPair> scores_of_quorum(const Problem& problem, const Division& division,
                                        std::int64_t i) {
  std::vector<IndexPair> scores;
  for (const Responsibility& r : division.responsibilities()) {
    const Range queries = division.chunk(division.chunk_of(i, r.query)).queries;
    const Range keys = division.chunk(division.chunk_of(i, r.key)).keys;
    for (std::int64_t query = queries.begin; query < queries.end; ++query) {
      for (std::int64_t key = keys.begin; key < keys.end; ++key) {
        if (problem.mask == Mask::none || key <= query) scores.emplace_back(query, key);
      }
    }
  }
  return scores;
}

// That quorum i computes just its scores, each once. With good responsibilities (divide_test) the
// quorums' scores are disjoint and all there are.
void check_quorum(const Problem& problem, const Division& division, std::int64_t i, int depth) {
  std::vector<IndexPair> scores;
  collect_scores(scores, problem, division.work(i), depth);
  std::vector<IndexPair> expected = scores_of_quorum(problem, division, i);
  std::sort(scores.begin(), scores.end());
  std::sort(expected.begin(), expected.end());
  BOOST_REQUIRE_MESSAGE(scores == expected, "c " << division.chunk_count() << ", quorum " << i
                                                 << ", depth " << depth << ", causal "
                                                 << (problem.mask == Mask::causal));
}

// Every quorum, one token a part at the given depth.
void check_all(std::int64_t c, int depth, Mask mask) {
  const std::int64_t length = c << depth;
  check_exactly_once(make_problem(length, length, mask), c, 1,
                     std::vector<std::int64_t>(depth, parts));
}

}  // namespace

BOOST_AUTO_TEST_CASE(depth_1_every_c) {
  for (std::int64_t c = 1; c <= 300; c += c <= 60 ? 1 : deep_stride()) {
    const std::int64_t cut = c <= 100 && c % 3 == 0 ? 3 : 2;
    check_both_masks(tokens_for(c, cut), tokens_for(c, cut), c, 1, {cut});
  }
}

BOOST_AUTO_TEST_CASE(larger_c_in_full) {
  // Powers of two, Singer's moduli and their neighbours, and primes.
  std::vector<std::int64_t> depth_0 = {307,  381,  512,  553,  651,  757,  871, 993,
                                       1057, 1407, 1408, 2048, 2257, 2999, 4000};
  std::vector<std::int64_t> depth_1 = {307, 381, 512, 871, 1057, 1408};
  std::vector<std::int64_t> depth_2 = {307, 381, 512, 757};
  if (stride > 1 || !thorough()) {
    depth_0 = {381, 512};
    depth_1 = {307};
    depth_2 = {};
  }
  for (const Mask mask : {Mask::none, Mask::causal}) {
    for (const std::int64_t c : depth_0) check_all(c, 0, mask);
    for (const std::int64_t c : depth_1) check_all(c, 1, mask);
    for (const std::int64_t c : depth_2) check_all(c, 2, mask);
  }
}

BOOST_AUTO_TEST_CASE(largest_c_by_sampled_quorums) {
  const unsigned seed = 11;
  std::mt19937 random(seed);
  std::vector<std::int64_t> moduli = {4001, 4161, 6973, 9506, 11557, 16257, 19999, max_modulus};
  for (int i = 0; i < 6; ++i) moduli.push_back(4000 + random() % (max_modulus - 4000));
  BOOST_TEST_CONTEXT("seed " << seed) {
    for (std::size_t m = 0; m < moduli.size(); m += stride) {
      const std::int64_t c = moduli[m];
      for (const Mask mask : {Mask::none, Mask::causal}) {
        for (const int depth : {0, 1, 2}) {
          const Problem problem = make_problem(c << depth, c << depth, mask);
          const Division division(problem, c, 1);
          const std::int64_t sampled = random() % c;
          for (const std::int64_t i : {std::int64_t{0}, sampled, c - 1}) {
            // Twice divided, a quorum has hundreds of pieces: one is enough.
            if (depth < 2 || i == sampled) check_quorum(problem, division, i, depth);
          }
        }
      }
    }
  }
}
