// Every c up to 300, divided again and again: the most expensive check, so on its own.
#define BOOST_TEST_MODULE divide_depth_2
#include <boost/test/unit_test.hpp>

#include "core/exactly_once.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_AUTO_TEST_CASE(depth_2_every_c) {
  for (std::int64_t c = 1; c <= 300; c += c <= 60 ? 1 : deep_stride()) {
    check_both_masks(tokens_for(c, 4), tokens_for(c, 4), c, 1, {2, 2});
  }
}

BOOST_AUTO_TEST_CASE(other_parts_at_each_depth) { check_both_masks(90, 90, 7, 1, {3, 4}); }
