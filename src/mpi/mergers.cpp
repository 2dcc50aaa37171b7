#include "mpi/mergers.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <span>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

Mergers::Mergers(const Plan& plan, const MergeShares& shares, Communicator& communicator)
    : plan_(plan), shares_(shares), communicator_(communicator) {}

void Mergers::hear(int rank, const Message& message) {
  switch (message.said) {
    case Said::ready: {
      Start& start = starts_[rank];
      start.bytes.resize(static_cast<std::size_t>(message.count));
      start.request = communicator_.receive(rank, start_tag, start.bytes);
      coming_.push_back(rank);
      return;
    }
    case Said::written:
      ++written_;
      return;
    case Said::failed:
      if (failed()) return;
      failure_ = fmt::format("rank {}: {}", rank, message.text.data());
      bad_input_ = message.bad_input;
      return;
    case Said::ended:
      ++ended_;
      durable_scores_ += static_cast<std::uint64_t>(message.count);
      return;
    default:
      throw Error(fmt::format("rank {} sent a message that a merger does not send", rank));
  }
}

bool Mergers::poll() {
  const auto came = std::erase_if(coming_, [this](int rank) {
    Start& start = starts_.at(rank);
    if (!start.request.done()) return false;
    read(start);
    if (!start.merged.empty()) pieces_.emplace(rank, PieceTable(plan_, shares_.chunks(rank)));
    return true;
  });
  ready_ += static_cast<int>(came);
  return came > 0;
}

void Mergers::read(Start& start) const {
  std::memcpy(&start.start, start.bytes.data(), sizeof start.start);
  const auto table = std::span(start.bytes).subspan(sizeof start.start);
  start.merged.resize(table.size() / sizeof(std::int32_t));
  if (!table.empty()) std::memcpy(start.merged.data(), table.data(), table.size());
  start.bytes = {};
}

std::int64_t Mergers::window(std::int64_t own) const {
  for (const auto& [rank, start] : starts_) own = std::min(own, start.start.window);
  return own;
}

Resumed Mergers::resumed(Resumed own) const {
  for (const auto& [rank, start] : starts_) own += start.start.resumed;
  return own;
}

std::int64_t Mergers::lacking_pieces(const SubproblemKey& subproblem, std::int64_t chunk) {
  if (group_number(plan_, subproblem.batch, subproblem.group) < plan_.groups_done) return 0;
  const std::int64_t pieces = piece_count(plan_, plan_.division.chunk(chunk).queries);
  const int rank = shares_.rank_of(chunk);
  const std::vector<std::int32_t>& merged = starts_.at(rank).merged;
  if (merged.empty()) return pieces;
  if (!uses_) uses_.emplace(plan_);
  const QuorumList quorums = uses_->quorums(Side::query, chunk);
  const auto place =
      std::lower_bound(quorums.begin(), quorums.end(), subproblem.quorum) - quorums.begin();
  const std::int64_t first =
      pieces_.at(rank).number({subproblem.batch, subproblem.group, chunk, 0});
  return std::count_if(merged.begin() + first, merged.begin() + first + pieces,
                       [&](std::int32_t count) { return count <= place; });
}

void Mergers::rethrow_if_failed() const {
  if (!failed()) return;
  if (bad_input_) throw InputError(failure_);
  throw Error(failure_);
}

}  // namespace stream_cqsa
