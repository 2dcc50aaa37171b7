// The pieces of a plan, numbered.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/partial.hpp"

namespace stream_cqsa {

/// Numbers every piece of some query chunks from 0 on, without gaps, by (batch, group, chunk,
/// piece).
class PieceTable {
 public:
  /// Of the chunks that this rank merges.
  explicit PieceTable(const Plan& plan) : PieceTable(plan, plan.merged_chunks) {}
  PieceTable(const Plan& plan, const Range& chunks);

  std::int64_t count() const { return batches_ * groups_ * first_.back(); }

  /// Whether there is such a piece here.
  bool has(const PieceKey& key) const;

  /// Throws std::logic_error for a piece of another chunk.
  std::int64_t number(const PieceKey& key) const;

  PieceKey key(std::int64_t number) const;

 private:
  std::int64_t batches_;
  std::int64_t groups_;
  Range chunks_;
  std::vector<std::int64_t> first_;  ///< of each of them within a group, then all of a group
};

}  // namespace stream_cqsa
