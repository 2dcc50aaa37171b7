// Which worker computes which subproblem.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "engine/assignment.hpp"
#include "engine/slot_cache.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// Hands out subproblems to workers that ask, counts what comes back, and hands out again what a
/// lost worker had. What several workers have is withdrawn from the others when one has computed
/// it. Bookkeeping alone, with no messages and no threads: the same calls at the same times give
/// the same answers.
///
/// Partials are merged in ascending order of subproblem, and those that come early wait: where they
/// lie if the merging side has no room. So that nobody waits for a partial that stands behind
/// waiting ones, a worker is given its subproblems in ascending order, except for those that lie
/// within `window` of the oldest that is not merged: the merging side has room for all of these. A
/// worker whose waiting partials are in the way of an older subproblem (whose worker was lost)
/// gives them up, see Order::abandon.
///
/// Where several ranks merge, each its own query chunks, `window` is the smallest of theirs. Each
/// has room for what lies within its window of the oldest that it itself has not merged, which is
/// never before the oldest of all, so all of them have room for these subproblems. The partials of
/// the oldest of all are the next ones wherever they go. What is said here of it may be behind the
/// truth, since mergers tell by messages: then less is handed out early, and no more.
class Dispatcher {
 public:
  struct Options {
    std::int64_t window = 0;       ///< subproblems whose partials may all come early
    int ahead = 2;                 ///< subproblems that a worker has at a time
    std::int64_t chunks_kept = 0;  ///< chunks that a worker keeps from one subproblem to the next
    /// Seconds, by which workers' speeds are known; without it an idle worker repeats at once.
    std::function<double()> now = nullptr;
    /// This subproblem, and those after it, are held back at first, see hold_from().
    std::int64_t held_from = std::numeric_limits<std::int64_t>::max();
  };

  /// How many pieces of a query chunk still lack the partial of a subproblem.
  using Lacking = std::function<std::int64_t(const SubproblemKey& key, std::int64_t chunk)>;

  Dispatcher(const Plan& plan, int workers, const Options& options, Lacking lacking);

  /// What is handed out as one.
  struct Work {
    std::vector<bool> wanted;      ///< see Assignment
    std::vector<ChunkKey> chunks;  ///< that it needs, for the sake of those that a worker keeps
    std::int64_t pieces = 0;       ///< that are not merged; 0: there is nothing to do
  };
  using Describe = std::function<Work(std::int64_t id)>;

  /// Hands out `count` other things than subproblems, described when they are first looked at.
  Dispatcher(std::int64_t count, int workers, const Options& options, Describe describe);

  struct Order {
    Assignment assignment;
    /// Subproblems of this worker whose partials must be dropped when they come: they will be
    /// computed again. received() is called for them too.
    std::vector<std::int64_t> abandon;
  };
  /// The next subproblem for a worker, or none for now: nobody gets a second one while another,
  /// who could begin it, has none. Near the end an idle worker gets one that
  /// another still computes, where it should be done with it sooner: the first result counts.
  std::optional<Order> next(int worker);

  /// Whether all that is not held back has been handed out, and something is held back.
  bool has_come_to_held();
  /// From now on this subproblem, and those after it, are held back, and all before are not.
  void hold_from(std::int64_t id) { held_from_ = id; }
  /// What is held back is never handed out: all others are all.
  void leave_held();

  /// The worker has computed the subproblem: all of its partials wait, or have come.
  void computed(int worker, std::int64_t id);

  /// All partials of the subproblem that come from this worker have come, or were dropped.
  void received(int worker, std::int64_t id);

  /// What a worker has and need not compute any more, since another one has.
  struct Withdrawal {
    int worker = 0;
    std::int64_t id = 0;
  };
  /// Those since the last call. A worker that has not begun leaves it out, see left_out(); another
  /// one goes on: it has computed() it later.
  std::vector<Withdrawal> withdrawals() { return std::exchange(withdrawals_, {}); }

  /// The worker does not compute what was withdrawn: no partial of it comes.
  void left_out(int worker, std::int64_t id);

  /// One piece of the subproblem is merged. Pieces that were not lacking do not count.
  void merged_piece(std::int64_t id);

  /// The worker computes no more. Its waiting partials still come, unless `with_partials`.
  void lost(int worker, bool with_partials);

  bool all_merged() const { return oldest_ == count_; }
  std::int64_t oldest_unmerged() const { return oldest_; }
  std::int64_t window() const { return options_.window; }
  int workers_left() const;
  /// Subproblems handed out more than once, for the report.
  std::int64_t repeated() const { return repeated_; }
  /// Those of them that were left out.
  std::int64_t withdrawn() const { return withdrawn_; }

 private:
  struct Task {
    Work work;
    std::set<int> workers;  ///< that have it, until all of their partials have come
    bool received = false;  ///< all of its partials have come: what is not merged of them will be
  };
  struct Worker {
    bool lost = false;
    std::set<std::int64_t> computing;
    std::set<std::int64_t> delivering;      ///< computing, or with partials that have not come
    std::set<std::int64_t> withdrawn;       ///< computing, but another one has computed them
    std::set<std::int64_t> abandoned;       ///< whose partials have not all come to be dropped
    std::map<ChunkKey, std::int64_t> kept;  ///< when each was last used
    std::int64_t orders = 0;
    double began = 0;  ///< when it began what it computes now
    double busy = 0;   ///< seconds, for what it has computed
    std::int64_t computed = 0;
  };

  void fill();
  bool add(std::int64_t id);
  bool oldest_is_stranded() const;
  std::optional<std::int64_t> choose(const Worker& worker) const;
  std::int64_t missing_chunks(const Worker& worker, const Task& task) const;
  bool may_take(const Worker& worker, std::int64_t id) const;
  std::optional<std::int64_t> choose_again(const Worker& idle);
  std::optional<std::int64_t> latest_of_others(double own, double at) const;
  bool others_have_less(const Worker& worker) const;
  /// Of what a worker computes itself; of one that has computed nothing, what the others need.
  double seconds_each(const Worker& worker) const;
  double now() const { return options_.now ? options_.now() : 0; }
  Order assign(int worker, std::int64_t id);
  void keep_chunks(Worker& worker, const Task& task) const;
  void withdraw(std::int64_t id);
  void take_back(int worker, std::int64_t id);
  void forget_merged();

  std::int64_t count_;
  std::int64_t held_from_;
  Options options_;
  Describe describe_;
  std::vector<Worker> workers_;
  std::int64_t cursor_ = 0;             ///< smallest subproblem that was never looked at
  std::int64_t oldest_ = 0;             ///< smallest that is not merged
  std::map<std::int64_t, Task> tasks_;  ///< looked at and not merged
  std::set<std::int64_t> open_;         ///< those of them that no worker has
  std::vector<Withdrawal> withdrawals_;
  double busy_ = 0;            ///< of all workers
  std::int64_t computed_ = 0;  ///< likewise
  /// Since the workers' tasks changed last, nothing was found for one that needs this long for a
  /// subproblem, or longer. For as many workers as wait to be asked one after the other.
  std::optional<double> nothing_for_;
  double nothing_at_ = 0;
  std::int64_t repeated_ = 0;
  std::int64_t withdrawn_ = 0;
};

}  // namespace stream_cqsa
