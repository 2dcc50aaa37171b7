#include "mpi/partial_sender.hpp"

#include <numeric>
#include <stdexcept>

namespace stream_cqsa {

PartialSender::PartialSender(const Plan& plan, int mergers, std::byte* memory,
                             Communicator& communicator, Abort& abort)
    : memory_(memory),
      buffer_bytes_(plan.host.state_buffer_bytes),
      communicator_(communicator),
      buffers_(
          abort,
          [&] {
            std::vector<std::int32_t> numbers(static_cast<std::size_t>(plan.host.state_buffers));
            std::iota(numbers.rbegin(), numbers.rend(), 0);
            return numbers;
          }()),
      shares_(plan, mergers) {}

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
  const int to = shares_.rank_of(partial.key.chunk);
  const std::scoped_lock lock(mutex_);
  Order& order = orders_[partial.subproblem];
  offer.order = order.number;
  ++order.offered[to];
  waiting_.push_back({to, offer, partial.states});
}

void PartialSender::end_of_subproblem(std::int64_t id) {
  Message computed;
  computed.said = Said::computed;
  computed.subproblem = id;
  const std::scoped_lock lock(mutex_);
  Order& order = orders_[id];
  computed.order = order.number;
  for (const auto& [rank, partials] : order.offered) {
    if (rank == 0) continue;
    ++computed.mergers;
    Message own = computed;
    own.count = partials;
    waiting_.push_back({rank, own, {}});
  }
  computed.count = order.offered[0];
  waiting_.push_back({0, computed, {}});
  orders_.erase(id);
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

void PartialSender::ordered(std::int64_t subproblem, std::int64_t order) {
  const std::scoped_lock lock(mutex_);
  orders_[subproblem].number = order;
}

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
  header.request = communicator_.send(waiting.to, to_master_tag, header.message.bytes());
  if (waiting.message.said != Said::offer) return;
  const SoftmaxStates& rows = waiting.states;
  const std::int64_t bytes = softmax_state_bytes(rows.rows, rows.dim);
  const std::int32_t buffer = waiting.message.buffer;
  const std::span<const std::byte> data(data_of(buffer), static_cast<std::size_t>(bytes));
  states_.push_back({communicator_.send(waiting.to, states_tag + buffer, data), buffer});
}

bool PartialSender::empty() const {
  const std::scoped_lock lock(mutex_);
  return waiting_.empty() && headers_.empty() && states_.empty();
}

}  // namespace stream_cqsa
