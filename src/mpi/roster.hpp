// The workers of a run, as the master knows them.
#pragma once

#include <set>
#include <string>
#include <vector>

namespace stream_cqsa {

/// What is told of a worker whose rank is lost.
inline constexpr const char* lost_text = "lost";

/// Why workers take no part any more, or empty: by worker.
using Failures = std::vector<std::string>;

/// Workers are numbered from 0 on, as their ranks ascend. One that fails takes no part any more; it
/// ends when it is told to, or lost.
class Roster {
 public:
  /// `failures` of those that take no part from the start, and have ended.
  Roster(int first_rank, const Failures& failures);

  int count() const { return static_cast<int>(failures_.size()); }
  int rank_of(int worker) const { return first_rank_ + worker; }
  int worker_of(int rank) const { return rank - first_rank_; }

  void fail(int worker, const std::string& why) {
    failures_[at(worker)] = why.empty() ? "no reason given" : why;
  }
  void end(int worker) { ended_[at(worker)] = true; }
  /// It has failed, if it had not, and ended.
  void lose(int worker);

  bool has_failed(int worker) const { return !failures_[at(worker)].empty(); }
  bool has_ended(int worker) const { return ended_[at(worker)]; }
  bool have_all_ended() const;
  const Failures& failures() const { return failures_; }
  /// Ranks of those that have failed.
  std::set<int> absent() const;
  /// A line that names those that have not ended.
  std::string silent() const;
  /// A line, where all have failed.
  std::string nobody_left() const;

 private:
  static std::size_t at(int worker) { return static_cast<std::size_t>(worker); }

  int first_rank_;
  Failures failures_;
  std::vector<bool> ended_;
};

}  // namespace stream_cqsa
