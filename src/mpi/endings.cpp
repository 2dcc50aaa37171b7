#include "mpi/endings.hpp"

#include <algorithm>
#include <numeric>

#include "stream_cqsa/checkpoint.hpp"
#include "stream_cqsa/engine.hpp"

namespace stream_cqsa {

Ending ending_of(const Abort& abort, bool all_merged) {
  try {
    abort.rethrow_if_failed();
    return all_merged ? Ending::complete : Ending::abandon;
  } catch (const Stopped&) {
    return Ending::checkpoint;
  } catch (...) {
    return Ending::abandon;
  }
}

void rethrow_if_failed(const Abort& abort, const Plan& plan, std::uint64_t scores_of_mergers) {
  try {
    abort.rethrow_if_failed();
  } catch (const Stopped& stopped) {
    const auto expected = expected_scores(plan);
    const auto all =
        static_cast<double>(std::accumulate(expected.begin(), expected.end(), std::uint64_t{0}));
    const double more = all > 0 ? static_cast<double>(scores_of_mergers) / all : 0.0;
    throw Stopped(std::min(1.0, stopped.merged() + more));
  }
}

}  // namespace stream_cqsa
