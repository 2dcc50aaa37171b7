// How often the tests with random input try.
#pragma once

#include <algorithm>
#include <cstdlib>

namespace stream_cqsa::testing {

/// `usual`; where the environment variable STREAM_CQSA_TEST_SHARE is n, an nth of it, at least one:
/// for tools that make a program a hundred times slower.
inline int trials(int usual) {
  const char* share = std::getenv("STREAM_CQSA_TEST_SHARE");
  return share == nullptr ? usual : std::max(1, usual / std::max(1, std::atoi(share)));
}

}  // namespace stream_cqsa::testing
