// Tile sizes of the portable kernel.
#pragma once

namespace stream_cqsa::cuda {

/// Tile sizes for a padded head dimension and the keys of a tile.
template <int D, int Keys>
struct MmaTile {
  static constexpr int warps = 4;
  static constexpr int queries = D <= 128 ? 128 : 64;
  static constexpr int keys = Keys;
  static constexpr bool query_in_registers = D <= 64;
  static constexpr int blocks_per_sm = D <= 128 ? 2 : 1;

  static constexpr int threads = 32 * warps;
  static constexpr int warp_rows = queries / warps;
  static constexpr int row_tiles = warp_rows / 16;
  static constexpr int units = D / 8;                          ///< of 16 bytes in a row
  static constexpr int copy_units = units == 12 ? 16 : units;  ///< threads that copy a row
  static constexpr int copy_rows = threads / copy_units;       ///< rows that are copied at once
  /// A row is padded by 16 bytes: an odd number of units, so that the 8 rows of a matrix that
  /// ldmatrix reads lie in different banks.
  static constexpr int row_bytes = 2 * D + 16;
  static constexpr int query_bytes = queries * row_bytes;
  static constexpr int key_bytes = keys * row_bytes;
  static constexpr int shared_bytes = query_bytes + 4 * key_bytes;  ///< two stages of K and V

  static_assert(D % 32 == 0 && keys % 16 == 0 && warp_rows % 16 == 0);
  static_assert(threads % copy_units == 0 && queries % copy_rows == 0 && keys % copy_rows == 0);
  static_assert(shared_bytes <= 162 * 1024, "must fit compute capability 8.0");
};

/// The keys of a tile: many, but no more than registers hold the scores of; and so few that compute
/// capability 8.6 runs it, up to a padded dimension of 96 in two blocks of a multiprocessor.
template <int D>
struct MmaKeys {
  static constexpr int large = D == 96 ? 48 : D <= 128 ? 64 : 32;
  static constexpr int small = D == 32 ? 64 : D == 64 || D == 128 ? 32 : 16;

  static constexpr int per_block = 99 * 1024;
  static constexpr int of_query_tile = 128;
  static constexpr int bytes = MmaTile<D, small>::shared_bytes + of_query_tile;
  static_assert(bytes <= per_block && (D > 96 || 2 * (bytes + 1024) <= per_block + 1024));
};

}  // namespace stream_cqsa::cuda
