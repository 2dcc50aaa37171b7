// Checking sampled rows of an output against the fp64 reference.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "app/problem.hpp"
#include "stream_cqsa/reference.hpp"

namespace stream_cqsa {

/// `count` different rows: the first and the last of the sequence, then random ones, the same for
/// the same seed. Fewer when there are fewer rows. Time: O(count log count).
std::vector<RowIndex> sample_rows(const Problem& problem, std::int64_t count, std::uint64_t seed);

/// One row's comparison.
struct VerifiedRow {
  RowIndex row;
  RowCheck output;
  std::optional<RowCheck> lse;  ///< where an lse was checked
  bool ok() const { return output.ok && (!lse || lse->ok); }
};

struct Verification {
  std::vector<VerifiedRow> rows;
  bool ok() const;  ///< no row is wrong; also where none is comparable
  /// Rows of O that were held to a bound; the others are those in which fp32 may overflow.
  std::int64_t compared() const;
  std::int64_t not_comparable() const {
    return static_cast<std::int64_t>(rows.size()) - compared();
  }
};

using RowValues = std::function<std::vector<double>(const RowIndex&)>;

/// The most rows that can be verified in some hours and about 1 GiB: each takes key length x head
/// dimension steps in fp64, and memory until all are compared. At least 1.
std::int64_t most_rows(const Problem& problem);

/// Keys that the mask keeps, summed over `rows`: what verify_rows tells `seen` in all.
std::int64_t visible_keys(const Problem& problem, const std::vector<RowIndex>& rows);

/// Compares each row, fetched by `row_of` ([dim] values of O), with the reference; and its lse,
/// fetched by `lse_of` (one value), where that is given.
Verification verify_rows(OpenProblem& open, const std::vector<RowIndex>& rows,
                         const RowValues& row_of, const RowValues& lse_of = nullptr,
                         const KeysSeen& seen = nullptr);

/// One line for people: how many rows, the worst error and what is allowed there, and how many rows
/// were not comparable.
std::string describe(const Verification& verification);

/// Infinite bounds become null.
nlohmann::json to_json(const Verification& verification);

/// What to_json() was given. Throws nlohmann::json::exception where it is something else.
Verification read_verification(const nlohmann::json& json);

}  // namespace stream_cqsa
