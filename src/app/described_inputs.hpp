// A problem and its tensors, told to ranks that do not open them.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>

#include "app/problem.hpp"
#include "mpi/remote_inputs.hpp"

namespace stream_cqsa {

/// What another process needs to know of the inputs.
nlohmann::json describe_inputs(const OpenProblem& open);

/// The same on a rank whose inputs are at rank 0.
struct DescribedInputs {
  std::unique_ptr<RemoteInputs> inputs;
  Problem problem;
};
DescribedInputs described_inputs(const nlohmann::json& description, Communicator& communicator);

}  // namespace stream_cqsa
