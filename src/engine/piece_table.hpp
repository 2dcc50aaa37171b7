// The pieces of a plan, numbered.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/partial.hpp"

namespace stream_cqsa {

/// Numbers every piece from 0 on, without gaps, by (batch, group, chunk, piece).
class PieceTable {
 public:
  explicit PieceTable(const Plan& plan);

  std::int64_t count() const { return batches_ * groups_ * first_.back(); }

  /// Whether the plan has this piece.
  bool has(const PieceKey& key) const;

  std::int64_t number(const PieceKey& key) const;

  PieceKey key(std::int64_t number) const;

 private:
  std::int64_t batches_;
  std::int64_t groups_;
  std::vector<std::int64_t> first_;  ///< of each chunk within a group, then all of a group
};

}  // namespace stream_cqsa
