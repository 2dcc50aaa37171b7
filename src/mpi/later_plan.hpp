// The plan by which the ranks of a run go on when they have ended the one before.
#pragma once

#include <optional>
#include <set>
#include <string>

#include "mpi/communicator.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

struct LaterPlan {
  Plan plan;             ///< whose groups_done are finished by those before
  std::set<int> absent;  ///< ranks that compute no more
};

/// Waits for what the master tells, see OthersWaiting; none where the run does not go on. Throws
/// LostRank where the master is lost.
std::optional<LaterPlan> receive_later_plan(Communicator& communicator);

/// The ranks that the master has told to wait for a later plan. Those that are not told one by then
/// hear at this object's end that the run does not go on, whatever has happened.
class OthersWaiting {
 public:
  explicit OthersWaiting(Communicator& communicator) : communicator_(communicator) {}
  ~OthersWaiting();
  OthersWaiting(const OthersWaiting&) = delete;
  OthersWaiting& operator=(const OthersWaiting&) = delete;

  /// From now on all other ranks wait, but the `absent`.
  void begin(const std::set<int>& absent);

  /// Tells those that wait.
  void tell(const Plan& plan);

 private:
  void send(const std::string& text);

  Communicator& communicator_;
  std::set<int> ranks_;  ///< that wait
};

}  // namespace stream_cqsa
