// Singer's perfect difference sets, from the planes of the field GF(q^3).
#pragma once

#include <cstdint>
#include <vector>

namespace stream_cqsa {

/// Whether q is a power of one prime (q >= 2).
bool is_prime_power(std::int64_t q);

/// The q + 1 residues mod q*q + q + 1, ascending from 0, whose differences give every non-zero
/// residue exactly once (J. Singer, A theorem in finite projective geometry, 1938).
/// `q` must be a prime power; q*q*q must stay below 2^31.
std::vector<std::int32_t> singer_difference_set(std::int64_t q);

}  // namespace stream_cqsa
