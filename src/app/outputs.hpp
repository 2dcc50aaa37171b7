// The files of O and the lse.
#pragma once

#include <memory>

#include "app/problem.hpp"
#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

struct Sinks {
  std::unique_ptr<TensorSink> output, lse;  ///< or none
};

/// Creates the outputs. With `keep`, unfinished ones of an earlier run are continued, and stay if
/// this run ends early.
Sinks create_sinks(const OpenProblem& open, const OutputOptions& options, bool keep);

/// The unfinished ones of another rank of this run, which commits them. Throws InputError where
/// they cannot be seen from here.
Sinks join_sinks(const Plan& plan, const OutputOptions& options);

}  // namespace stream_cqsa
