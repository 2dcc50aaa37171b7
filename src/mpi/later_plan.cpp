#include "mpi/later_plan.hpp"

#include <sstream>

#include "mpi/error.hpp"
#include "mpi/protocol.hpp"

namespace stream_cqsa {

namespace {

// A line of what the plan's own text lacks, then that.
std::string text_of(const LaterPlan& later) {
  std::ostringstream out;
  out << later.plan.groups_done;
  for (const int rank : later.absent) out << ' ' << rank;
  out << '\n';
  write_json(later.plan, false, out);
  return out.str();
}

}  // namespace

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
  std::vector<int> absent;
  for (int rank = 0; numbers >> rank;) absent.push_back(rank);
  LaterPlan later{read_plan(in, "of rank 0"), std::move(absent)};
  later.plan.groups_done = groups_done;
  return later;
}

void send_later_plan(Communicator& communicator, int mergers,
                     const std::vector<std::string>& failures, const Plan* plan) {
  const auto failed = [&](int rank) {
    return rank > mergers && !failures[static_cast<std::size_t>(rank - 1 - mergers)].empty();
  };
  std::vector<int> absent, present;
  for (int rank = 1; rank < communicator.size(); ++rank)
    (failed(rank) ? absent : present).push_back(rank);
  const std::string text = plan ? text_of(LaterPlan{*plan, absent}) : "";
  for (const int rank : present) {
    try {
      communicator.send_text(rank, plan_tag, text);
    } catch (const LostRank&) {
      // It is told of where it is missed.
    }
  }
}

}  // namespace stream_cqsa
