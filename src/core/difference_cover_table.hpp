// Optimal difference covers of small moduli, found by exhaustive search.
#pragma once

#include <cstdint>
#include <span>

namespace stream_cqsa {

inline constexpr std::int64_t max_tabulated_modulus = 111;

/// A cover of Z_c with the fewest residues, ascending from 0, for 1 <= c <= max_tabulated_modulus.
std::span<const std::uint8_t> tabulated_cover(std::int64_t c);

}  // namespace stream_cqsa
