// What each subproblem of a plan asks of each stage, on average over a sweep.
#pragma once

#include <cstdint>
#include <memory>

#include "core/plan_sizes.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// Of one subproblem.
struct Demand {
  double read_bytes = 0;
  double copied_bytes = 0;
  double new_chunks = 0;  ///< key chunks that are in no slot yet
  double key_chunks = 0;
  double query_chunks = 0;
  double query_bytes = 0;  ///< of all query chunks, new or not
  double flop = 0;
  double partial_bytes = 0;
  double spilled_bytes = 0;    ///< to and from the accumulator file
  double finished_bytes = 0;   ///< of outputs
  double written_bytes = 0;    ///< of these, to new places in the files
  double rewritten_bytes = 0;  ///< with the rest of their rows
};

/// The demands of a plan's subproblems, which must outlive this, but for those of the head groups
/// that are done before: the first of the others finds none of its rows in the host cache. Loads of
/// chunks are averages of a sweep over the quorums of a head group, see estimate_traffic(), and of
/// many quorums some stand for all.
class Demands {
 public:
  explicit Demands(const Plan& plan);
  ~Demands();
  Demands(const Demands&) = delete;
  Demands& operator=(const Demands&) = delete;

  Demand of(const SubproblemKey& key) const;

 private:
  class Sweep;

  std::int64_t groups() const { return static_cast<std::int64_t>(plan_.groups.size()); }
  double bytes_of(std::int64_t tokens, std::int64_t heads) const;
  std::int64_t first_group(std::int64_t batch) const;
  double new_chunks(double key_chunks, std::int64_t quorum) const;
  double read_bytes(const SubproblemKey& key, double share) const;
  bool rewrites(std::int64_t group) const;

  const Plan& plan_;
  const Problem& problem_;
  const Cut cut_;
  const Traffic traffic_;
  const std::unique_ptr<const Sweep> sweep_;
  const double batch_;
  const double input_bytes_;
  const double loads_;  ///< of key chunks in a sweep
  /// Bytes read for a batch entry, for the rest of the one of which some groups are done, and for
  /// the first group of either.
  const double entry_reads_, rest_reads_, first_reads_;
};

}  // namespace stream_cqsa
