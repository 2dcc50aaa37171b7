// How often the tests with random input try.
#pragma once

#include <algorithm>
#include <cstdlib>

namespace stream_cqsa::testing {

/// `usual`; where the environment variable STREAM_CQSA_TEST_SHARE is n, an nth of it, at least one:
/// for who waits for the tests, and for tools that make a program a hundred times slower.
template <typename Count>
Count trials(Count usual) {
  const char* share = std::getenv("STREAM_CQSA_TEST_SHARE");
  const int divisor = share == nullptr ? 1 : std::max(1, std::atoi(share));
  return std::max<Count>(1, usual / static_cast<Count>(divisor));
}

}  // namespace stream_cqsa::testing
