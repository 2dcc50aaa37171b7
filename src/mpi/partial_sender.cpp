#include "mpi/partial_sender.hpp"

#include <numeric>
#include <stdexcept>

namespace stream_cqsa {

PartialSender::PartialSender(const Plan& plan, std::byte* memory, Communicator& communicator,
                             Abort& abort)
    : memory_(memory),
      buffer_bytes_(plan.host.state_buffer_bytes),
      communicator_(communicator),
      buffers_(abort, [&] {
        std::vector<std::int32_t> numbers(static_cast<std::size_t>(plan.host.state_buffers));
        std::iota(numbers.rbegin(), numbers.rend(), 0);
        return numbers;
      }()) {}

// --- the pipeline's threads ---

bool PartialSender::try_buffer(Buffer& buffer) {
  const auto number = buffers_.try_take();
  if (number) buffer = {*number, data_of(*number)};
  return number.has_value();
}

PartialReceiver::Buffer PartialSender::wait_buffer() {
  const std::int32_t number = buffers_.take();
  return {number, data_of(number)};
}

void PartialSender::deliver(const Partial& partial) {
  Message offer;
  offer.said = Said::offer;
  offer.buffer = partial.buffer;
  offer.subproblem = partial.subproblem;
  offer.piece = partial.key;
  offer.scores = partial.scores;
  const std::scoped_lock lock(mutex_);
  ++offered_[partial.subproblem];
  waiting_.push_back({offer, partial.states});
}

void PartialSender::end_of_subproblem(std::int64_t id) {
  Message computed;
  computed.said = Said::computed;
  computed.subproblem = id;
  const std::scoped_lock lock(mutex_);
  computed.count = offered_[id];
  offered_.erase(id);
  waiting_.push_back({computed, {}});
}

bool PartialSender::try_output_buffer(Buffer&) {
  throw std::logic_error("a worker finishes no rows");
}
PartialReceiver::Buffer PartialSender::wait_output_buffer() {
  throw std::logic_error("a worker finishes no rows");
}
void PartialSender::deliver_finished(const FinishedRows&) {
  throw std::logic_error("a worker finishes no rows");
}

// --- the communication thread ---

bool PartialSender::send() {
  bool did_something = false;
  for (auto states = states_.begin(); states != states_.end();) {
    if (!states->request.settled()) {
      ++states;
      continue;
    }
    buffers_.give(states->buffer);
    states = states_.erase(states);
    did_something = true;
  }
  headers_.remove_if([](Header& header) { return header.request.settled(); });
  std::deque<Waiting> waiting;
  {
    const std::scoped_lock lock(mutex_);
    waiting.swap(waiting_);
  }
  for (const Waiting& one : waiting) send_one(one);
  return did_something || !waiting.empty();
}

void PartialSender::send_one(const Waiting& waiting) {
  Header& header = headers_.emplace_back(Header{waiting.message, {}});
  header.request = communicator_.send(0, to_master_tag, header.message.bytes());
  if (waiting.message.said != Said::offer) return;
  const SoftmaxStates& rows = waiting.states;
  const std::int64_t bytes = softmax_state_bytes(rows.rows, rows.dim);
  const std::int32_t buffer = waiting.message.buffer;
  const std::span<const std::byte> data(data_of(buffer), static_cast<std::size_t>(bytes));
  states_.push_back({communicator_.send(0, states_tag + buffer, data), buffer});
}

bool PartialSender::empty() const {
  const std::scoped_lock lock(mutex_);
  return waiting_.empty() && headers_.empty() && states_.empty();
}

}  // namespace stream_cqsa
