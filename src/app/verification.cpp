#include "app/verification.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <random>

namespace stream_cqsa {
namespace {

// Part of the fixed overhead beside the budgets.
constexpr std::int64_t verification_buffer_bytes = std::int64_t{16} << 20;

// How close to, or beyond, what is allowed. A failed check ranks above every passed one.
double severity(const VerifiedRow& row) {
  if (!row.ok()) return HUGE_VAL;
  return row.check.allowed > 0 ? row.check.max_error / row.check.allowed : 0;
}

// lse in fp32: the rounding of the largest score and of the sum, and of lse itself.
bool lse_agrees(const Problem& problem, const ReferenceRow& row, const std::vector<double>& lse) {
  if (lse.empty()) return false;
  if (!std::isfinite(row.lse)) return !std::isfinite(lse.front());
  const double keys = static_cast<double>(problem.key_length);
  const double allowed =
      0x1p-24 * (8 * (row.max_score_magnitude + std::log2(keys) + 4) + 2 * std::abs(row.lse));
  return std::abs(lse.front() - row.lse) <= allowed;
}

}  // namespace

std::vector<RowIndex> sample_rows(const Problem& problem, std::int64_t count, std::uint64_t seed) {
  const std::int64_t total = problem.batch * problem.query_length * problem.query_heads;
  count = std::min(count, total);
  std::vector<RowIndex> rows;
  if (count > 0) rows.push_back({0, 0, 0});
  if (count > 1) {
    rows.push_back({problem.batch - 1, problem.query_length - 1, problem.query_heads - 1});
  }
  std::mt19937_64 random(seed);
  const auto below = [&](std::int64_t bound) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(bound));
  };
  while (static_cast<std::int64_t>(rows.size()) < count) {
    const RowIndex row{below(problem.batch), below(problem.query_length),
                       below(problem.query_heads)};
    if (std::find(rows.begin(), rows.end(), row) == rows.end()) rows.push_back(row);
  }
  return rows;
}

bool Verification::ok() const {
  return std::all_of(rows.begin(), rows.end(), [](const VerifiedRow& row) { return row.ok(); });
}

const VerifiedRow& Verification::worst() const {
  return *std::max_element(
      rows.begin(), rows.end(),
      [](const VerifiedRow& a, const VerifiedRow& b) { return severity(a) < severity(b); });
}

Verification verify_rows(OpenProblem& open, const std::vector<RowIndex>& rows,
                         const RowValues& row_of, const RowValues& lse_of) {
  const auto references = reference_rows(open.problem, *open.query, *open.key, *open.value, rows,
                                         verification_buffer_bytes);
  Verification verification;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    verification.rows.push_back(
        {rows[i], check_row(open.problem, references[i], row_of(rows[i])),
         !lse_of || lse_agrees(open.problem, references[i], lse_of(rows[i]))});
  }
  return verification;
}

std::string describe(const Verification& verification) {
  if (verification.rows.empty()) return "no rows checked";
  const auto& [row, check, lse_ok] = verification.worst();
  return fmt::format(
      "{}: {} rows against fp64; worst at batch {}, token {}, head {}: error {:.3g}, allowed "
      "{:.3g}{}",
      verification.ok() ? "verified" : "FAILED", verification.rows.size(), row.batch, row.token,
      row.head, check.max_error, check.allowed, lse_ok ? "" : "; its lse is wrong");
}

nlohmann::json to_json(const Verification& verification) {
  auto rows = nlohmann::json::array();
  for (const auto& [row, check, lse_ok] : verification.rows) {
    rows.push_back({{"batch", row.batch},
                    {"token", row.token},
                    {"head", row.head},
                    {"max_error", check.max_error},
                    {"allowed", check.allowed},
                    {"lse_ok", lse_ok},
                    {"ok", check.ok && lse_ok}});
  }
  return {{"ok", verification.ok()}, {"rows", rows}};
}

}  // namespace stream_cqsa
