// Checking sampled rows of an output against the fp64 reference.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <vector>

#include "app/problem.hpp"
#include "stream_cqsa/reference.hpp"

namespace stream_cqsa {

/// `count` rows: the first and the last of the sequence, then random ones, the same for the same
/// seed. Fewer when there are fewer rows.
std::vector<RowIndex> sample_rows(const Problem& problem, std::int64_t count, std::uint64_t seed);

/// One row's comparison.
struct VerifiedRow {
  RowIndex row;
  RowCheck check;
  bool lse_ok = true;
  bool ok() const { return check.ok && lse_ok; }
};

struct Verification {
  std::vector<VerifiedRow> rows;
  bool ok() const;
  /// The row with the largest error beside what is allowed. Needs at least one row.
  const VerifiedRow& worst() const;
};

using RowValues = std::function<std::vector<double>(const RowIndex&)>;

/// Compares each row, fetched by `row_of` ([dim] values of O), with the reference; and its lse,
/// fetched by `lse_of` (one value), where that is given.
Verification verify_rows(OpenProblem& open, const std::vector<RowIndex>& rows,
                         const RowValues& row_of, const RowValues& lse_of = nullptr);

/// One line for people: how many rows, the worst error and what is allowed there.
std::string describe(const Verification& verification);

nlohmann::json to_json(const Verification& verification);

}  // namespace stream_cqsa
