// The orders that the master has given to workers.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <utility>

#include "mpi/intake.hpp"

namespace stream_cqsa {

/// Numbers orders, and knows when all partials of one have come: those of a worker come to each
/// rank that merges by themselves, and each of these says when it has its own. Used by the
/// communication thread alone.
class Orders {
 public:
  /// A new one, by which the rank computes the subproblem. Returns its number, from 1 on.
  std::int64_t give(int rank, std::int64_t subproblem) {
    return numbers_[{rank, subproblem}] = ++last_;
  }

  /// The number of the one by which the rank computes the subproblem, if it does.
  std::optional<std::int64_t> number(int rank, std::int64_t subproblem) const {
    const auto at = numbers_.find({rank, subproblem});
    if (at == numbers_.end()) return std::nullopt;
    return at->second;
  }

  /// It is computed, and its partials come to so many ranks.
  void computed(const Source& source, int receivers) { arrivals_[source].of = receivers; }

  /// One rank has all that come to it. True where all have: then the order is done with.
  bool received(const Source& source) {
    Arrival& arrival = arrivals_[source];
    if (++arrival.came != arrival.of) return false;
    arrivals_.erase(source);
    numbers_.erase({source.rank, source.subproblem});
    return true;
  }

  /// Nothing comes of it.
  void left_out(int rank, std::int64_t subproblem) { numbers_.erase({rank, subproblem}); }

  /// The rank is lost, with what it computed.
  void forget(int rank) {
    std::erase_if(arrivals_, [&](const auto& arrival) { return arrival.first.rank == rank; });
    std::erase_if(numbers_, [&](const auto& number) { return number.first.first == rank; });
  }

 private:
  /// How many of the ranks that merge have all that comes to them.
  struct Arrival {
    int came = 0;
    int of = -1;  ///< -1: not known yet
  };
  std::map<std::pair<int, std::int64_t>, std::int64_t> numbers_;  ///< by rank and subproblem
  std::map<Source, Arrival> arrivals_;
  std::int64_t last_ = 0;
};

}  // namespace stream_cqsa
