// Which pieces may have an accumulator.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "engine/partial.hpp"

namespace stream_cqsa {

/// Counts accumulators so that no merge ever waits for one. A piece may be begun when there are
/// enough for it and for all unfinished pieces of the sweeps before its own, which a plan with
/// accumulators in memory has at least for one sweep: a head group, or with tiles a row of one.
/// Counts the pieces that this rank merges, that have partials, and whose head group is not done
/// before. Not thread-safe.
class OpenPieces {
 public:
  /// `unlimited`: accumulators that do not fit go to a file.
  OpenPieces(const Plan& plan, bool unlimited);

  bool may_begin(const PieceKey& key) const;
  void begin(const PieceKey& key) { ++begun_[sweep_of(key)]; }
  /// The piece is finished, `begun` or not: it may have needed no accumulator.
  void end(const PieceKey& key, bool begun);

 private:
  /// The pieces that are open at once, numbered in the order of the schedule.
  std::size_t sweep_of(const PieceKey& key) const {
    return number_of(groups_outer_ ? key.batch * groups_ + key.group : key.batch, key.chunk);
  }
  std::size_t number_of(std::int64_t sweep, std::int64_t chunk) const {
    return static_cast<std::size_t>(by_chunk_ ? sweep * chunks_.size() + chunk - chunks_.begin
                                              : sweep);
  }
  void pass_finished();

  bool unlimited_;
  bool groups_outer_;
  bool by_chunk_;
  std::int64_t groups_;
  Range chunks_;
  std::int64_t accumulators_;
  std::vector<std::int64_t> unfinished_;       ///< by sweep
  std::size_t first_unfinished_ = 0;           ///< sweep
  std::map<std::size_t, std::int64_t> begun_;  ///< by sweep
};

}  // namespace stream_cqsa
