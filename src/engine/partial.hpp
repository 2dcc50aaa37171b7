// What the computing side hands to the merging side.
#pragma once

#include <cstddef>
#include <cstdint>

#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace stream_cqsa {

/// A run of query rows of one head group whose states are merged, kept and written together.
/// Piece j of a chunk starts j * Plan::piece_tokens after the chunk does.
struct PieceKey {
  std::int64_t batch = 0;
  std::int64_t group = 0;
  std::int64_t chunk = 0;
  std::int64_t piece = 0;
  friend auto operator<=>(const PieceKey&, const PieceKey&) = default;
};

/// Pieces of the largest query chunk; a shorter chunk may have fewer.
std::int64_t piece_count(const Plan& plan, const Range& queries);

/// The query rows of a piece.
Range piece_range(const Plan& plan, const PieceKey& key);

/// Rows (tokens times query heads of the group) of a piece.
std::int64_t piece_rows(const Plan& plan, const PieceKey& key);

/// How many of these query tokens see no key: always the first ones.
std::int64_t keyless_tokens(const Problem& problem, const Range& queries);

/// Whether the ranks that compute take whole head groups of a batch entry, merge them on their
/// devices and deliver finished rows: then such a group is what is handed out, and what messages
/// call a subproblem.
inline bool computes_by_groups(const Plan& plan) {
  return plan.placement == AccumulatorPlacement::device;
}
/// Pieces of a head group, of these query chunks, with any partials.
std::int64_t pieces_of_group(const Plan& plan, const Range& chunks);
/// The same of all query chunks.
std::int64_t pieces_of_group(const Plan& plan);

/// Bytes of a piece's finished rows in an output buffer.
std::int64_t finished_bytes(const Plan& plan, const PieceKey& key);

/// The states of one piece from one subproblem, in a buffer lent by the receiver.
struct Partial {
  PieceKey key;
  std::int64_t subproblem = 0;
  std::int64_t scores = 0;  ///< live scores of one head that went into it
  std::int32_t buffer = 0;
  SoftmaxStates states;
};

/// The rows of one piece that were merged and finished on the device, in an output buffer lent by
/// the receiver.
struct FinishedRows {
  PieceKey key;
  std::int64_t scores = 0;  ///< live scores of one head that were merged into it
  std::int32_t buffer = 0;
};

/// What an output buffer holds of a piece, see FinishedLayout. With accumulators on the host the
/// lse itself stands in m's place, and there is no l.
struct FinishedStates {
  std::byte* output = nullptr;  ///< O, [token][head][dim] in the output type
  float* m = nullptr;           ///< [rows], or null where the plan has no lse
  float* l = nullptr;
};
FinishedStates finished_at(const Plan& plan, const PieceKey& key, std::byte* buffer);

/// Where partials, or rows finished on the device, go: the merger of this rank, or messages to
/// another.
class PartialReceiver {
 public:
  virtual ~PartialReceiver() = default;

  /// A state buffer if one is free (its number, and where it lies).
  struct Buffer {
    std::int32_t number = 0;
    std::byte* data = nullptr;
  };
  virtual bool try_buffer(Buffer& buffer) = 0;
  /// Waits for one. The caller must have delivered every buffer that it already holds.
  virtual Buffer wait_buffer() = 0;
  /// Hands over a filled buffer. May be called in any order of subproblems.
  virtual void deliver(const Partial& partial) = 0;
  /// All partials of the subproblem have been delivered.
  virtual void end_of_subproblem(std::int64_t) {}

  /// The same for output buffers and finished rows.
  virtual bool try_output_buffer(Buffer& buffer) = 0;
  virtual Buffer wait_output_buffer() = 0;
  virtual void deliver_finished(const FinishedRows& rows) = 0;
};

}  // namespace stream_cqsa
