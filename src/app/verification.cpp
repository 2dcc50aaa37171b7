#include "app/verification.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <tuple>

#include "core/counted.hpp"

namespace stream_cqsa {
namespace {

// Part of the fixed overhead beside the budgets.
constexpr std::int64_t verification_buffer_bytes = std::int64_t{16} << 20;

// How close to, or beyond, what is allowed. A failed check ranks above every passed one, and one
// without a bound below.
double severity(const RowCheck& check) {
  if (!check.ok) return HUGE_VAL;
  if (!check.comparable()) return -1;
  return check.allowed > 0 ? check.max_error / check.allowed : 0;
}

double output_severity(const VerifiedRow& row) { return severity(row.output); }
double lse_severity(const VerifiedRow& row) { return row.lse ? severity(*row.lse) : -2; }

// Where a check stands and what it found.
std::string describe(const RowIndex& row, const RowCheck& check) {
  std::string text =
      fmt::format("worst at batch {}, token {}, head {}: ", row.batch, row.token, row.head);
  if (check.ok || check.max_error > check.allowed) {
    return text + fmt::format("error {:.3g}, allowed {:.3g}", check.max_error, check.allowed);
  }
  return text + (check.comparable() ? "missing, or not finite exactly where fp64 is not"
                                    : "NaN where fp32 overflows and fp64 does not");
}

nlohmann::json check_json(const RowCheck& check) {
  return {{"max_error", check.max_error},
          {"allowed", check.allowed},
          {"comparable", check.comparable()},
          {"ok", check.ok}};
}

RowCheck read_check(const nlohmann::json& json) {
  const auto number = [&json](const char* name) {
    return json.at(name).is_null() ? HUGE_VAL : json.at(name).get<double>();
  };
  return {number("max_error"), number("allowed"), json.at("ok").get<bool>()};
}

}  // namespace

std::vector<RowIndex> sample_rows(const Problem& problem, std::int64_t count, std::uint64_t seed) {
  const std::int64_t total = problem.batch * problem.query_length * problem.query_heads;
  count = std::min(count, total);
  std::vector<RowIndex> rows;
  std::set<std::tuple<std::int64_t, std::int64_t, std::int64_t>> taken;
  const auto take = [&](const RowIndex& row) {
    if (taken.insert({row.batch, row.token, row.head}).second) rows.push_back(row);
  };
  if (count > 0) take({0, 0, 0});
  if (count > 1) take({problem.batch - 1, problem.query_length - 1, problem.query_heads - 1});
  std::mt19937_64 random(seed);
  const auto below = [&](std::int64_t bound) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(bound));
  };
  while (static_cast<std::int64_t>(rows.size()) < count) {
    take({below(problem.batch), below(problem.query_length), below(problem.query_heads)});
  }
  return rows;
}

bool Verification::ok() const {
  return std::all_of(rows.begin(), rows.end(), [](const VerifiedRow& row) { return row.ok(); });
}

std::int64_t Verification::compared() const {
  return std::count_if(rows.begin(), rows.end(),
                       [](const VerifiedRow& row) { return row.output.comparable(); });
}

std::int64_t most_rows(const Problem& problem) {
  // About 6 hours at 5 ns a step.
  constexpr std::int64_t most_steps = std::int64_t{1} << 42;
  constexpr std::int64_t most_bytes = std::int64_t{1} << 30;
  // Three vectors in fp64 and what belongs to them.
  const std::int64_t row_bytes = 3 * 8 * problem.head_dim + 512;
  return std::max<std::int64_t>(
      1, std::min(most_steps / (problem.key_length * problem.head_dim), most_bytes / row_bytes));
}

std::int64_t visible_keys(const Problem& problem, const std::vector<RowIndex>& rows) {
  std::int64_t keys = 0;
  for (const RowIndex& row : rows) {
    keys += std::clamp<std::int64_t>(problem.visible_keys(row.token), 0, problem.key_length);
  }
  return keys;
}

Verification verify_rows(OpenProblem& open, const std::vector<RowIndex>& rows,
                         const RowValues& row_of, const RowValues& lse_of, const KeysSeen& seen) {
  const auto references = reference_rows(open.problem, *open.query, *open.key, *open.value, rows,
                                         verification_buffer_bytes, seen, 0);
  Verification verification;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    VerifiedRow verified{rows[i], check_row(open.problem, references[i], row_of(rows[i])), {}};
    if (lse_of) {
      const std::vector<double> lse = lse_of(rows[i]);
      verified.lse = lse.empty() ? RowCheck() : check_lse(open.problem, references[i], lse.front());
    }
    verification.rows.push_back(verified);
  }
  return verification;
}

std::string describe(const Verification& verification) {
  const auto& rows = verification.rows;
  if (rows.empty()) return "no rows checked";
  if (verification.ok() && verification.compared() == 0) {
    return fmt::format("NOT COMPARABLE: fp32 may overflow in all {}, whose error has no bound",
                       counted(static_cast<std::int64_t>(rows.size()), "sampled row"));
  }
  const VerifiedRow& worst = *std::ranges::max_element(rows, {}, output_severity);
  const VerifiedRow& worst_lse = *std::ranges::max_element(rows, {}, lse_severity);
  std::string text =
      fmt::format("{}: {} against fp64; {}", verification.ok() ? "verified" : "FAILED",
                  counted(verification.compared(), "row"), describe(worst.row, worst.output));
  if (worst_lse.lse) text += "; lse: " + describe(worst_lse.row, *worst_lse.lse);
  if (verification.not_comparable() == 0) return text;
  return text + fmt::format("; not comparable: {} with infinite bound",
                            counted(verification.not_comparable(), "row"));
}

nlohmann::json to_json(const Verification& verification) {
  auto rows = nlohmann::json::array();
  for (const VerifiedRow& verified : verification.rows) {
    nlohmann::json row = check_json(verified.output);
    row["batch"] = verified.row.batch;
    row["token"] = verified.row.token;
    row["head"] = verified.row.head;
    if (verified.lse) row["lse"] = check_json(*verified.lse);
    rows.push_back(row);
  }
  return {{"ok", verification.ok()},
          {"compared", verification.compared()},
          {"not_comparable", verification.not_comparable()},
          {"rows", rows}};
}

Verification read_verification(const nlohmann::json& json) {
  Verification verification;
  for (const nlohmann::json& row : json.at("rows")) {
    VerifiedRow verified{{row.at("batch").get<std::int64_t>(), row.at("token").get<std::int64_t>(),
                          row.at("head").get<std::int64_t>()},
                         read_check(row),
                         {}};
    if (row.contains("lse")) verified.lse = read_check(row["lse"]);
    verification.rows.push_back(verified);
  }
  return verification;
}

}  // namespace stream_cqsa
