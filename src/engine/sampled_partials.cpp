#include "engine/sampled_partials.hpp"

#include <numeric>
#include <stdexcept>

namespace stream_cqsa {
namespace {

std::vector<std::int32_t> all_buffers(std::int64_t count) {
  std::vector<std::int32_t> numbers(static_cast<std::size_t>(count));
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

// The rows of a token, one for each of `heads`.
void keep(const SoftmaxStates& states, std::int64_t token, std::int64_t heads, SampledToken& kept) {
  const std::int64_t row = token * heads;
  kept.acc.assign(states.acc + row * states.dim, states.acc + (row + heads) * states.dim);
  kept.m.assign(states.m + row, states.m + row + heads);
  kept.l.assign(states.l + row, states.l + row + heads);
  ++kept.delivered;
}

}  // namespace

SampledPartials::SampledPartials(const Plan& plan, std::byte* memory,
                                 const std::vector<std::int64_t>& tokens, Abort& abort)
    : plan_(plan), memory_(memory), buffers_(abort, all_buffers(plan.host.state_buffers)) {
  for (const std::int64_t token : tokens) tokens_.push_back({token, {}, {}, {}, 0});
}

bool SampledPartials::try_buffer(Buffer& free) {
  const auto number = buffers_.try_take();
  if (number) free = buffer(*number);
  return number.has_value();
}

void SampledPartials::deliver(const Partial& partial) {
  const Range queries = piece_range(plan_, partial.key);
  const std::int64_t heads =
      plan_.groups[static_cast<std::size_t>(partial.key.group)].query_heads(plan_.problem()).size();
  scores_ += static_cast<std::uint64_t>(partial.scores) * static_cast<std::uint64_t>(heads);
  for (SampledToken& sampled : tokens_) {
    if (!queries.contains(sampled.token)) continue;
    keep(partial.states, sampled.token - queries.begin, heads, sampled);
  }
  buffers_.give(partial.buffer);
}

bool SampledPartials::try_output_buffer(Buffer&) {
  throw std::logic_error("partials are sampled where accumulators are not on the device");
}

PartialReceiver::Buffer SampledPartials::wait_output_buffer() {
  throw std::logic_error("partials are sampled where accumulators are not on the device");
}

void SampledPartials::deliver_finished(const FinishedRows&) {
  throw std::logic_error("partials are sampled where accumulators are not on the device");
}

}  // namespace stream_cqsa
