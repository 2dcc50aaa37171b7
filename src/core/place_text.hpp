// Where accumulators are, for people.
#pragma once

#include <string_view>

#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

inline std::string_view place_text(AccumulatorPlacement placement) {
  if (placement == AccumulatorPlacement::device) return "on the device";
  return placement == AccumulatorPlacement::memory ? "in memory" : "in memory and a file";
}

}  // namespace stream_cqsa
