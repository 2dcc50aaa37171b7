// Rates and times for people.
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <string>

namespace stream_cqsa {

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
