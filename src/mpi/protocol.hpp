// What master and workers say to each other.
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
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

/// Tags. The states of an offered partial come under states_tag plus the number of the worker's
/// buffer, which belongs to no other partial until they have come.
enum Tag : int { to_master_tag = 1, to_worker_tag = 2, report_tag = 8, states_tag = 16 };

enum class Said : std::int32_t {
  // A worker to the master.
  ready,     ///< it has its memory: its work begins
  offer,     ///< a partial waits: its states are sent when the master asks MPI for them
  computed,  ///< `count` partials of `subproblem` were offered; there are no more
  failed,    ///< the worker computes no more, see `text`; what it offered can still be had
  ended,     ///< the worker's last message
  // The master to a worker.
  assign,  ///< compute `subproblem`, those of its query chunks that are in `wanted`
  stop,    ///< compute no more, say `ended` when all that was offered has been sent
};

/// Every message but the states themselves: small, of one size.
struct Message {
  Said said = Said::ready;
  std::int32_t buffer = 0;  ///< of the worker, of an offer
  std::int64_t subproblem = 0;
  PieceKey piece;           ///< of an offer
  std::int64_t scores = 0;  ///< of an offer, see Partial
  std::int64_t count = 0;
  std::array<std::uint64_t, 8> wanted{};  ///< a bit for each chunk's position in the quorum
  std::array<char, 320> text{};           ///< ends with a zero

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

}  // namespace stream_cqsa
