#include "mpi/later_plan.hpp"

#include <fmt/format.h>

#include <sstream>

#include "mpi/error.hpp"
#include "mpi/protocol.hpp"

namespace stream_cqsa {

std::optional<LaterPlan> receive_later_plan(Communicator& communicator) {
  const auto text = communicator.receive_text(0, plan_tag);
  if (!text) throw LostRank("rank 0, the master, was lost");
  if (text->empty()) return std::nullopt;
  std::istringstream in(*text);
  std::string line;
  std::getline(in, line);
  std::istringstream numbers(line);
  std::int64_t groups_done = 0;
  numbers >> groups_done;
  std::set<int> absent;
  for (int rank = 0; numbers >> rank;) absent.insert(rank);
  LaterPlan later{read_plan(in, "of rank 0"), std::move(absent)};
  later.plan.groups_done = groups_done;
  return later;
}

OthersWaiting::~OthersWaiting() {
  try {
    send("");
  } catch (const std::exception& error) {
    communicator_.abort(fmt::format("rank 0: {}", error.what()));
  }
}

void OthersWaiting::begin(const std::set<int>& absent) {
  for (int rank = 1; rank < communicator_.size(); ++rank) {
    if (!absent.contains(rank)) ranks_.insert(rank);
  }
}

// A line of what the plan's own text lacks, then that.
void OthersWaiting::tell(const Plan& plan) {
  std::ostringstream out;
  out << plan.groups_done;
  for (int rank = 1; rank < communicator_.size(); ++rank) {
    if (!ranks_.contains(rank)) out << ' ' << rank;
  }
  out << '\n';
  write_json(plan, false, out);
  send(out.str());
}

void OthersWaiting::send(const std::string& text) {
  while (!ranks_.empty()) {
    const int rank = *ranks_.begin();
    ranks_.erase(rank);
    try {
      communicator_.send_text(rank, plan_tag, text);
    } catch (const LostRank&) {
      // It is told of where it is missed.
    }
  }
}

}  // namespace stream_cqsa
