// Text for people: rates, times, standard output.
#pragma once

#include <fmt/format.h>

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <system_error>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

/// Prints to standard output. Throws Error when that cannot take it, a full disk for instance.
inline void print_out(const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0) {
    return;
  }
  throw Error(
      fmt::format("standard output cannot be written: {}", std::generic_category().message(errno)));
}

/// A checksum, as 16 digits.
inline std::string hexadecimal(std::uint64_t number) { return fmt::format("{:016x}", number); }

/// "0.42 s", "3m07s", "2h05m", "4d03h".
inline std::string format_duration(double seconds) {
  if (!(seconds >= 0) || std::isinf(seconds)) return "unknown";
  if (seconds < 60) return fmt::format("{:.{}f} s", seconds, seconds < 10 ? 2 : 0);
  const auto whole = static_cast<std::int64_t>(seconds + 0.5);
  if (whole < 3600) return fmt::format("{}m{:02}s", whole / 60, whole % 60);
  if (whole < 86400) return fmt::format("{}h{:02}m", whole / 3600, whole / 60 % 60);
  return fmt::format("{}d{:02}h", whole / 86400, whole / 3600 % 24);
}

/// "56.2 GFLOP/s", "1.20 TFLOP/s".
inline std::string format_flops(double per_second) {
  return per_second >= 1e12 ? fmt::format("{:.2f} TFLOP/s", per_second * 1e-12)
                            : fmt::format("{:.1f} GFLOP/s", per_second * 1e-9);
}

}  // namespace stream_cqsa
