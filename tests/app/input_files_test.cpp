// Which inputs are read past the page cache.
#define BOOST_TEST_MODULE input_files
#include "app/input_files.hpp"

#include <boost/test/unit_test.hpp>

#include "stream_cqsa/error.hpp"

using namespace stream_cqsa;

namespace {

constexpr std::int64_t GiB = std::int64_t{1} << 30;

bool outgrows(std::int64_t gib, std::int64_t host_budget_gib, std::int64_t available_gib) {
  Machine machine;
  machine.memory = 2 * available_gib * GiB;
  machine.available_memory = available_gib * GiB;
  return outgrows_page_cache(gib * GiB, host_budget_gib * GiB, machine);
}

}  // namespace

BOOST_AUTO_TEST_CASE(inputs_that_memory_could_keep_go_through_the_page_cache) {
  BOOST_TEST(!outgrows(1, 1, 100));
  BOOST_TEST(!outgrows(50, 1, 100));
  BOOST_TEST(!outgrows(50, 50, 100));
}

BOOST_AUTO_TEST_CASE(inputs_beyond_half_of_memory_or_what_the_arenas_leave_do_not) {
  BOOST_TEST(outgrows(51, 1, 100));
  BOOST_TEST(outgrows(51, 0, 100));
  BOOST_TEST(outgrows(31, 70, 100));
  BOOST_TEST(!outgrows(29, 70, 100));
  BOOST_TEST(outgrows(1, 200, 100));
  BOOST_TEST(outgrows(1, 0, 0));
}

BOOST_AUTO_TEST_CASE(the_option_has_three_values) {
  BOOST_TEST(direct_option("yes").value());
  BOOST_TEST(!direct_option("no").value());
  BOOST_TEST(!direct_option("auto").has_value());
  BOOST_TEST(!direct_option("").has_value());
  for (const char* other : {"1", "YES", "never"})
    BOOST_CHECK_THROW(direct_option(other), InputError);
}
