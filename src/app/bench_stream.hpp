// `bench --only stream`: the whole pipeline from pinned host memory to host memory.
#pragma once

#include <nlohmann/json.hpp>

#include "app/arguments.hpp"

namespace stream_cqsa {

struct StreamOptions {
  InputOptions input;  ///< the synthetic part
  AttentionOptions attention;
  ResourceOptions resources;
  int rounds = 3;
  bool lockstep = false;  ///< a round starts with each line read from standard input
};

/// Runs the problem `rounds` times after a warm-up, each time from Q, K and V in pinned host memory
/// to O in host memory, and prints a line a round to `out`. The last result is checked against fp64
/// in sampled rows, outside the clock. Throws Error when it is wrong, InputError when standard
/// input has no line to start even the warm-up.
nlohmann::json bench_stream(const StreamOptions& options, std::FILE* out);

}  // namespace stream_cqsa
