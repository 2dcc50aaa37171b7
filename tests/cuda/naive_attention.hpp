// Attention on the device by its definition: the oracle for sizes that the host is too slow for.
#pragma once

#include "attention_case.hpp"

namespace stream_cqsa::testing {

/// brute_force() on the device, in fp64 too. The chunks must follow each other from token 0 on, and
/// the work lists must hold every live pair: the mask is applied to the sequence as a whole, where
/// `causal`. dim must be a multiple of 32.
CaseReference naive_attention(const AttentionCase& attention, bool causal);

}  // namespace stream_cqsa::testing
