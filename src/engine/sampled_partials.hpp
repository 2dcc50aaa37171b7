// Of a subproblem's partials, the softmax states of a few query tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/monitor.hpp"
#include "engine/partial.hpp"

namespace stream_cqsa {

/// The softmax states of one query token in one subproblem, of all query heads of the head group.
struct SampledToken {
  std::int64_t token = 0;
  std::vector<float> acc;   ///< [head][dim]
  std::vector<float> m, l;  ///< [head]
  /// Partials that had the token: 1 where all went well.
  std::int64_t delivered = 0;
};

/// Takes the partials of one subproblem, keeps what they hold of some query tokens, and counts the
/// scores that went into all of them. Nothing is merged.
class SampledPartials final : public PartialReceiver {
 public:
  /// `memory` holds the plan's state buffers. `tokens` are query tokens, any number of each.
  SampledPartials(const Plan& plan, std::byte* memory, const std::vector<std::int64_t>& tokens,
                  Abort& abort);

  bool try_buffer(Buffer& buffer) override;
  Buffer wait_buffer() override { return buffer(buffers_.take()); }
  void deliver(const Partial& partial) override;

  bool try_output_buffer(Buffer&) override;
  Buffer wait_output_buffer() override;
  void deliver_finished(const FinishedRows&) override;

  /// Valid when the pipeline has ended: in the order in which the tokens were given.
  const std::vector<SampledToken>& tokens() const { return tokens_; }
  /// Live scores of all partials, over all heads.
  std::uint64_t scores() const { return scores_; }

 private:
  Buffer buffer(std::int32_t number) const {
    return {number, memory_ + number * plan_.host.state_buffer_bytes};
  }

  const Plan& plan_;
  std::byte* memory_;
  // Of the one thread that delivers.
  std::vector<SampledToken> tokens_;
  std::uint64_t scores_ = 0;
  Pool<std::int32_t> buffers_;
};

}  // namespace stream_cqsa
