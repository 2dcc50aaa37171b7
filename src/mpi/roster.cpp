#include "mpi/roster.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace stream_cqsa {

Roster::Roster(int first_rank, const Failures& failures)
    : first_rank_(first_rank), failures_(failures) {
  for (const std::string& failure : failures) ended_.push_back(!failure.empty());
}

void Roster::lose(int worker) {
  if (!has_failed(worker)) fail(worker, lost_text);
  end(worker);
}

bool Roster::have_all_ended() const {
  return std::find(ended_.begin(), ended_.end(), false) == ended_.end();
}

std::set<int> Roster::absent() const {
  std::set<int> ranks;
  for (int worker = 0; worker < count(); ++worker) {
    if (has_failed(worker)) ranks.insert(rank_of(worker));
  }
  return ranks;
}

std::string Roster::silent() const {
  std::string ranks;
  for (int worker = 0; worker < count(); ++worker) {
    if (!has_ended(worker))
      ranks += fmt::format("{}{}", ranks.empty() ? "" : ", ", rank_of(worker));
  }
  return ranks.empty() ? "the workers do not answer"
                       : fmt::format("rank {} does not answer", ranks);
}

std::string Roster::nobody_left() const {
  const auto first = std::find_if(failures_.begin(), failures_.end(),
                                  [](const std::string& text) { return !text.empty(); });
  return fmt::format("no worker is left; rank {} failed with: {}",
                     rank_of(static_cast<int>(first - failures_.begin())), *first);
}

}  // namespace stream_cqsa
