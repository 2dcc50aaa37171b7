// Difference covers: sets of residues whose pairwise differences give every residue.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace stream_cqsa {

/// The largest modulus for which a cover is constructed.
inline constexpr std::int64_t max_modulus = 20000;

/// A set A of k residues modulo c such that { b - a mod c : a, b in A } = Z_c.
///
/// Example: c = 7, A = {0, 1, 3}. The six differences between distinct elements,
/// 1-0, 3-0, 3-1, 0-1, 0-3, 1-3, are 1, 3, 2, 6, 4, 5: each non-zero residue once, which makes
/// the cover perfect.
struct DifferenceCover {
  std::int64_t modulus = 1;            ///< c
  std::vector<std::int32_t> residues;  ///< A, ascending, residues[0] == 0

  std::int64_t size() const { return static_cast<std::int64_t>(residues.size()); }
  friend bool operator==(const DifferenceCover&, const DifferenceCover&) = default;
};

/// A small cover of Z_c for any c in 1..max_modulus: optimal for c <= 111 (exhaustive search),
/// perfect with k = q + 1 for c = q*q + q + 1 with q a prime power (Singer 1938), otherwise the
/// best of a product of two smaller covers and a Wichmann ruler (k about 1.22 sqrt(c)).
/// Deterministic. Throws InputError for c outside the range.
DifferenceCover difference_cover(std::int64_t c);

/// difference_cover(c).size(), without constructing the cover: a look-up after the first call.
/// Throws InputError for c outside 1..max_modulus.
std::int64_t difference_cover_size(std::int64_t c);

/// True when `residues` are distinct, ascending, in [0, c), start with 0 and cover Z_c.
bool is_difference_cover(std::int64_t c, std::span<const std::int32_t> residues);

}  // namespace stream_cqsa
