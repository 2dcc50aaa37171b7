#include "app/verification.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <random>

namespace stream_cqsa {
namespace {

// Part of the fixed overhead beside the budgets.
constexpr std::int64_t verification_buffer_bytes = std::int64_t{16} << 20;

// How close to, or beyond, what is allowed. A failed check ranks above every passed one.
double severity(const RowCheck& check) {
  if (!check.ok) return HUGE_VAL;
  return check.allowed > 0 ? check.max_error / check.allowed : 0;
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
  return std::all_of(rows.begin(), rows.end(), [](const VerifiedRow& row) { return row.check.ok; });
}

const VerifiedRow& Verification::worst() const {
  return *std::max_element(rows.begin(), rows.end(),
                           [](const VerifiedRow& a, const VerifiedRow& b) {
                             return severity(a.check) < severity(b.check);
                           });
}

Verification verify_rows(OpenProblem& open, const std::vector<RowIndex>& rows,
                         const std::function<std::vector<double>(const RowIndex&)>& row_of) {
  const auto references = reference_rows(open.problem, *open.query, *open.key, *open.value, rows,
                                         verification_buffer_bytes);
  Verification verification;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    verification.rows.push_back({rows[i], check_row(open.problem, references[i], row_of(rows[i]))});
  }
  return verification;
}

std::string describe(const Verification& verification) {
  if (verification.rows.empty()) return "no rows checked";
  const auto& [row, check] = verification.worst();
  return fmt::format(
      "{}: {} rows against fp64; worst at batch {}, token {}, head {}: error {:.3g}, allowed "
      "{:.3g}",
      verification.ok() ? "verified" : "FAILED", verification.rows.size(), row.batch, row.token,
      row.head, check.max_error, check.allowed);
}

nlohmann::json to_json(const Verification& verification) {
  auto rows = nlohmann::json::array();
  for (const auto& [row, check] : verification.rows) {
    rows.push_back({{"batch", row.batch},
                    {"token", row.token},
                    {"head", row.head},
                    {"max_error", check.max_error},
                    {"allowed", check.allowed},
                    {"ok", check.ok}});
  }
  return {{"ok", verification.ok()}, {"rows", rows}};
}

}  // namespace stream_cqsa
