#include "mpi/partial_sender.hpp"

#include <numeric>
#include <utility>

namespace stream_cqsa {

namespace {

std::vector<std::int32_t> buffer_numbers(const Plan& plan) {
  const HostArena& host = plan.host;
  std::vector<std::int32_t> numbers(static_cast<std::size_t>(
      computes_by_groups(plan) ? host.output_buffers : host.state_buffers));
  std::iota(numbers.rbegin(), numbers.rend(), 0);
  return numbers;
}

}  // namespace

PartialSender::PartialSender(const Plan& plan, int mergers, std::byte* memory,
                             Communicator& communicator, Abort& abort, SoFar so_far)
    : plan_(plan),
      pieces_of_group_(computes_by_groups(plan) ? pieces_of_group(plan) : 0),
      memory_(memory),
      buffer_bytes_(computes_by_groups(plan) ? plan.host.output_buffer_bytes
                                             : plan.host.state_buffer_bytes),
      communicator_(communicator),
      buffers_(abort, buffer_numbers(plan)),
      shares_(plan, mergers),
      so_far_(std::move(so_far)) {}

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
  Message message;
  message.buffer = partial.buffer;
  message.subproblem = partial.subproblem;
  message.piece = partial.key;
  message.scores = partial.scores;
  offer(message, softmax_state_bytes(partial.states.rows, partial.states.dim));
}

void PartialSender::deliver_finished(const FinishedRows& rows) {
  Message message;
  message.buffer = rows.buffer;
  message.subproblem = group_number(plan_, rows.key.batch, rows.key.group);
  message.piece = rows.key;
  message.scores = rows.scores;
  if (offer(message, finished_bytes(plan_, rows.key)) == pieces_of_group_)
    end_of_subproblem(message.subproblem);
}

// Returns how many of its order have been offered.
std::int64_t PartialSender::offer(Message message, std::int64_t bytes) {
  message.said = Said::offer;
  const int to = shares_.rank_of(message.piece.chunk);
  const std::scoped_lock lock(mutex_);
  Order& order = orders_[message.subproblem];
  message.order = order.number;
  ++order.offered[to];
  waiting_.push_back({to, message, bytes});
  return ++order.offered_in_all;
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
    waiting_.push_back({rank, own, 0});
  }
  computed.count = order.offered[0];
  computed.so_far = so_far_();
  waiting_.push_back({0, computed, 0});
  orders_.erase(id);
}

// --- the communication thread ---

void PartialSender::ordered(std::int64_t subproblem, std::int64_t order) {
  const std::scoped_lock lock(mutex_);
  orders_[subproblem].number = order;
}

void PartialSender::left_out(std::int64_t subproblem) {
  const std::scoped_lock lock(mutex_);
  orders_.erase(subproblem);
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
  const std::int32_t buffer = waiting.message.buffer;
  const std::span<const std::byte> data(data_of(buffer), static_cast<std::size_t>(waiting.bytes));
  states_.push_back({communicator_.send(waiting.to, states_tag + buffer, data), buffer});
}

bool PartialSender::empty() const {
  const std::scoped_lock lock(mutex_);
  return waiting_.empty() && headers_.empty() && states_.empty();
}

}  // namespace stream_cqsa
