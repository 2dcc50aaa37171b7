// Counts and lengths as people write them.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "stream_cqsa/problem.hpp"

namespace stream_cqsa {

/// "1 chunk", "7 chunks".
inline std::string counted(std::int64_t count, std::string_view noun) {
  return fmt::format("{} {}{}", count, noun, count == 1 ? "" : "s");
}

/// "16 tokens", "16 query and 1 key token", "query rows 3:5 of 16 and 16 key tokens".
inline std::string tokens_text(const Problem& problem) {
  const std::int64_t rows = problem.query_length;
  const std::int64_t sequence = problem.sequence_length();
  if (rows == sequence && rows == problem.key_length) return counted(rows, "token");
  const std::string queries = rows == sequence
                                  ? fmt::format("{} query", rows)
                                  : fmt::format("query rows {}:{} of {}", problem.queries_before,
                                                problem.queries_before + rows, sequence);
  return fmt::format("{} and {}", queries, counted(problem.key_length, "key token"));
}

}  // namespace stream_cqsa
