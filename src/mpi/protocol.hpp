// What master, mergers and workers say to each other.
//
// Where workers take whole head groups (see computes_by_groups()), messages are about these in the
// place of subproblems: `subproblem` is the number of a group of a batch entry (see
// group_number()), all of whose subproblems are handed out, computed and lost as one; what is
// offered are the finished rows of its pieces (O and, for the lse, m and l) instead of partial
// states; and `merged` counts pieces whose rows have come. Everything else is the same.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "engine/assignment.hpp"
#include "engine/partial.hpp"
#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/checkpoint.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/tensor.hpp"
#include "stream_cqsa/tuning.hpp"

namespace stream_cqsa {

/// Blocks of inputs that a worker may have asked the master for at once.
inline constexpr int most_input_requests = 32;

/// Tags. to_master_tag: to the master, and to mergers. The states of an offered partial come under
/// states_tag plus the number of the worker's buffer, which belongs to no other partial until they
/// have come; a MergerStart under start_tag; the answer to a request for input rows under
/// inputs_tag plus the number of the request; the text of a later plan (see LaterPlan) under
/// plan_tag; a rank's report under report_tag.
enum Tag : int {
  to_master_tag = 1,
  to_worker_tag = 2,
  start_tag = 3,
  plan_tag = 4,
  report_tag = 8,
  inputs_tag = 16,
  states_tag = inputs_tag + most_input_requests
};

enum class Said : std::int32_t {
  // A worker, or a merger, to the master.
  ready,   ///< it has its memory: its work begins; of a merger, `count` bytes of MergerStart follow
  failed,  ///< it goes on no more, see `text`; what a worker offered can still be had
  // A worker to the master.
  read,  ///< rows of `tensor`, see InputServer; the number of the request is in `buffer`
  // A worker to the rank that merges the query chunk: the master or a merger.
  offer,  ///< a partial, or finished rows, wait: they are sent when the receiver asks MPI for them
  // A worker to the master, and to each merger to which it offered any.
  computed,  ///< `count` partials of `subproblem` were offered to the receiver; there are no more;
             ///< to the master, also what the rank has done `so_far` by this plan
  // A worker to the master.
  left_out,  ///< the order `order` of `subproblem` was withdrawn before it had begun
  // A worker to the master and all mergers, or a merger to the master.
  ended,  ///< its last message; of a merger, `count` scores are in its checkpoint
  // The master to a worker.
  assign,    ///< compute `subproblem`, those of its query chunks that are in `wanted`
  withdraw,  ///< do not, where nothing of the order `order` has begun: another one has
  // The master's answers to `read`.
  rows,        ///< they follow
  unreadable,  ///< nothing but empty messages follows, see `text`
  too_late,    ///< the same: the run is at its end
  // The master to workers and mergers.
  stop,  ///< end as `ending` says: workers when all that they offered has been sent, then mergers
  // A merger to the master.
  merged,  ///< `count` pieces of `subproblem`; and `scores` have come, of all heads, since the last
  received,  ///< all partials of the order `order` of `subproblem` to the worker `rank` have come
  written,   ///< all of its rows, and its checkpoint has them
  // The master to a merger.
  drop,        ///< from now on, the partials of `order` of `subproblem` to the worker `rank`
  checkpoint,  ///< make one
  leave,       ///< nothing of the head group numbered `subproblem`, and of those after it, comes
};

/// How mergers end.
enum class Ending : std::int32_t {
  complete,    ///< all is merged: write the rest
  checkpoint,  ///< make what is merged durable
  abandon,     ///< something has failed
};

/// Every message but the states themselves: small, of one size.
struct Message {
  Said said = Said::ready;
  std::int32_t buffer = 0;  ///< of the worker, of an offer; of a `read`, see there
  std::int32_t rank = 0;
  std::int32_t mergers = 0;  ///< of `computed` to the master: how many were offered any
  Ending ending = Ending::complete;
  bool bad_input = false;       ///< of `failed`: an InputError
  bool goes_on = false;         ///< of `stop`: the text of a later plan follows, or an empty one
  std::int64_t subproblem = 0;  ///< or a head group's number, see above
  std::int64_t order = 0;       ///< the number of the order, among all, by which it was computed
  PieceKey piece;               ///< of an offer
  std::int64_t scores = 0;      ///< of an offer, see Partial
  std::int64_t count = 0;
  SlotTensor tensor = SlotTensor::query;  ///< to be read
  Block block;                            ///< to be read
  std::array<std::uint64_t, 8> wanted{};  ///< a bit for each chunk's position in the quorum
  std::array<char, 320> text{};           ///< ends with a zero
  RunSoFar so_far;                        ///< of `computed`

  std::span<std::byte> bytes() { return std::as_writable_bytes(std::span(this, 1)); }
  std::span<const std::byte> bytes() const { return std::as_bytes(std::span(this, 1)); }

  void set_text(const std::string& line) { line.copy(text.data(), text.size() - 1); }
  void set_wanted(const std::vector<bool>& positions) {
    if (positions.size() > 64 * wanted.size()) throw Error("a quorum is too large for a message");
    for (std::size_t i = 0; i < positions.size(); ++i) {
      if (positions[i]) wanted[i / 64] |= std::uint64_t{1} << (i % 64);
    }
  }
  /// With a place for every position; those after the quorum's last are false.
  std::vector<bool> wanted_positions() const {
    std::vector<bool> positions(64 * wanted.size());
    for (std::size_t i = 0; i < positions.size(); ++i) {
      positions[i] = (wanted[i / 64] >> (i % 64) & 1) != 0;
    }
    return positions;
  }
};
static_assert(std::is_trivially_copyable_v<Message>);

/// What a merger has when it is ready, and behind it, where a checkpoint had anything, how many
/// partials each of its pieces has merged: a std::int32_t by number in PieceTable.
struct MergerStart {
  std::int64_t window = 0;  ///< see Intake::window()
  Resumed resumed;
};
static_assert(std::is_trivially_copyable_v<MergerStart>);

}  // namespace stream_cqsa
