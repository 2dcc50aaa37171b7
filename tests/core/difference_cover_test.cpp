#define BOOST_TEST_MODULE difference_cover
#include "stream_cqsa/difference_cover.hpp"

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <thread>
#include <vector>

#include "core/singer.hpp"
#include "stream_cqsa/error.hpp"

using namespace stream_cqsa;

namespace {

// How often each difference occurs, over all ordered pairs.
std::vector<int> difference_counts(std::int64_t c, const std::vector<std::int32_t>& residues) {
  std::vector<int> counts(c, 0);
  for (const std::int64_t a : residues) {
    for (const std::int64_t b : residues) ++counts[b >= a ? b - a : b - a + c];
  }
  return counts;
}

bool covers(std::int64_t c, const std::vector<std::int32_t>& residues) {
  const std::vector<int> counts = difference_counts(c, residues);
  return std::find(counts.begin(), counts.end(), 0) == counts.end();
}

// Whether `residues` can be extended to a cover by at most `more` residues above its last.
bool extends_to_cover(std::int64_t c, std::vector<std::int32_t>& residues, int more) {
  if (covers(c, residues)) return true;
  if (more == 0) return false;
  for (std::int32_t next = residues.back() + 1; next < c; ++next) {
    residues.push_back(next);
    const bool found = extends_to_cover(c, residues, more - 1);
    residues.pop_back();
    if (found) return true;
  }
  return false;
}

}  // namespace

BOOST_AUTO_TEST_CASE(covers_are_valid_and_small) {
  // Every modulus up to 2000, then a sample: the step is a prime, so every residue class occurs.
  for (std::int64_t c = 1; c <= max_modulus; c += c < 2000 ? 1 : 7) {
    const DifferenceCover cover = difference_cover(c);
    const auto& a = cover.residues;
    BOOST_REQUIRE_EQUAL(cover.modulus, c);
    BOOST_REQUIRE_MESSAGE(!a.empty() && a.front() == 0 && a.back() < c, "c " << c);
    const bool ascending =
        std::adjacent_find(a.begin(), a.end(), std::greater_equal<>()) == a.end();
    BOOST_REQUIRE_MESSAGE(ascending, "c " << c);
    BOOST_REQUIRE_MESSAGE(covers(c, a), "c " << c);
    BOOST_REQUIRE_MESSAGE(is_difference_cover(c, a), "c " << c);
    // A ruler's rounding and the smallest moduli lie above the asymptotic 1.22.
    const double bound = c <= 111 ? 1.75 : c < 1000 ? 1.31 : 1.25;
    BOOST_REQUIRE_MESSAGE(static_cast<double>(a.size()) <= bound * std::sqrt(c), "c " << c);
  }
}

BOOST_AUTO_TEST_CASE(every_size_is_that_of_its_cover) {
  for (std::int64_t c = 1; c <= max_modulus; ++c) {
    BOOST_REQUIRE_EQUAL(difference_cover(c).size(), difference_cover_size(c));
  }
}

BOOST_AUTO_TEST_CASE(small_covers_are_optimal) {
  for (std::int64_t c = 2; c <= 24; ++c) {
    std::vector<std::int32_t> start = {0};
    const auto smaller = static_cast<int>(difference_cover_size(c)) - 2;
    BOOST_TEST(!extends_to_cover(c, start, smaller), "c " << c);
  }
}

// The sizes of the smallest covers, as published: of c = 3, 4, ..., 111.
BOOST_AUTO_TEST_CASE(covers_up_to_111_have_the_published_optimum) {
  const std::vector<std::int64_t> optimum = {
      2,  3,  3,  3,  3,  4,  4,  4,  4,  4,  4,  5,  5,  5,  5,  5,  5,  6,  5,  6,  6,  6,
      6,  6,  6,  6,  7,  7,  6,  7,  7,  7,  7,  7,  7,  8,  7,  8,  8,  8,  8,  8,  8,  8,
      8,  8,  8,  8,  8,  9,  9,  9,  9,  9,  8,  9,  9,  9,  9,  9,  9,  9,  9,  10, 10, 10,
      10, 10, 10, 10, 9,  10, 10, 10, 10, 10, 10, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11,
      10, 11, 11, 12, 11, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12};
  BOOST_REQUIRE(optimum.size() == 109u);
  for (std::size_t i = 0; i < optimum.size(); ++i) {
    const auto c = static_cast<std::int64_t>(i) + 3;
    BOOST_TEST(difference_cover(c).size() == optimum[i], "c " << c);
    BOOST_TEST(difference_cover_size(c) == optimum[i], "c " << c);
  }
}

BOOST_AUTO_TEST_CASE(known_covers) {
  BOOST_TEST(difference_cover(1).residues == std::vector<std::int32_t>({0}));
  BOOST_TEST(difference_cover(2).residues == std::vector<std::int32_t>({0, 1}));
  BOOST_TEST(difference_cover(7).residues == std::vector<std::int32_t>({0, 1, 3}));
}

BOOST_AUTO_TEST_CASE(prime_powers) {
  const std::vector<std::int64_t> expected = {2,  3,  4,  5,  7,  8,  9,  11, 13, 16, 17, 19,
                                              23, 25, 27, 29, 31, 32, 37, 41, 43, 47, 49};
  std::vector<std::int64_t> found;
  for (std::int64_t q = 0; q < 50; ++q) {
    if (is_prime_power(q)) found.push_back(q);
  }
  BOOST_TEST(found == expected, boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(singer_covers_are_perfect) {
  for (std::int64_t q = 2; q * q + q + 1 <= max_modulus; ++q) {
    if (!is_prime_power(q)) continue;
    const std::int64_t c = q * q + q + 1;
    for (const auto& residues : {singer_difference_set(q), difference_cover(c).residues}) {
      const std::vector<int> counts = difference_counts(c, residues);
      BOOST_TEST(residues.size() == static_cast<std::size_t>(q + 1));
      BOOST_TEST(std::count(counts.begin() + 1, counts.end(), 1) == c - 1, "q " << q);
    }
  }
}

BOOST_AUTO_TEST_CASE(moduli_out_of_range_are_refused) {
  for (const std::int64_t c : {std::int64_t{0}, std::int64_t{-7}, max_modulus + 1, INT64_MAX}) {
    BOOST_CHECK_THROW(difference_cover(c), InputError);
    BOOST_CHECK_THROW(difference_cover_size(c), InputError);
  }
}

BOOST_AUTO_TEST_CASE(wrong_covers_are_recognised) {
  const auto is_cover = [](std::int64_t c, std::vector<std::int32_t> residues) {
    return is_difference_cover(c, residues);
  };
  BOOST_TEST(is_cover(7, {0, 1, 3}));
  BOOST_TEST(!is_cover(7, {}));
  BOOST_TEST(!is_cover(7, {0, 1, 2}));       // 3 and 4 are missing
  BOOST_TEST(!is_cover(4, {0, 1}));          // 2 is missing
  BOOST_TEST(!is_cover(7, {1, 2, 4}));       // does not start with 0
  BOOST_TEST(!is_cover(7, {0, 3, 1}));       // not ascending
  BOOST_TEST(!is_cover(7, {0, 1, 1, 3}));    // not distinct
  BOOST_TEST(!is_cover(7, {0, 1, 3, 7}));    // out of range
  BOOST_TEST(!is_cover(7, {0, 100, 1, 3}));  // out of range and not ascending
  BOOST_TEST(!is_cover(7, {-1, 0, 1, 2, 3}));
  BOOST_TEST(!is_cover(0, {0}));
  BOOST_TEST(!is_cover(-3, {0}));
  BOOST_TEST(is_cover(1, {0}));
}

BOOST_AUTO_TEST_CASE(threads_agree) {
  const std::vector<std::int64_t> moduli = {12, 500, 553, 10000, 16257};
  std::vector<std::vector<DifferenceCover>> results(4);
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&] {
      for (const std::int64_t c : moduli) result.push_back(difference_cover(c));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) BOOST_TEST((result == results.front()));
}
