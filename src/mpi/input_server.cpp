#include "mpi/input_server.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "mpi/input_pieces.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

InputServer::InputServer(const Plan& plan, const Inputs& inputs, std::byte* memory,
                         int read_threads, Communicator& communicator)
    : inputs_(inputs),
      memory_(memory),
      communicator_(communicator),
      served_{plan.host.cache_blocks, plan.host.cache_block_bytes, 0, 0},
      free_buffers_(static_cast<std::size_t>(plan.host.cache_blocks)),
      to_read_(abort_, free_buffers_.size() + 1),
      was_read_(abort_, free_buffers_.size() + 1),
      crew_(abort_) {
  const PlanRequest& request = plan.request;
  if (request.query.resident || request.key.resident || request.value.resident ||
      free_buffers_.empty()) {
    throw InputError("the plan has no memory for inputs on their way: plan for inputs in files");
  }
  std::iota(free_buffers_.rbegin(), free_buffers_.rend(), 0);
  for (int i = 0; i < std::max(read_threads, 1); ++i) crew_.start([this] { read_blocks(); });
}

InputServer::~InputServer() {
  to_read_.close();
  crew_.join();
}

// --- reader threads ---

void InputServer::read_blocks() {
  while (auto answer = to_read_.pop()) {
    read(**answer);
    was_read_.push(std::move(*answer));
  }
}

void InputServer::read(Answer& answer) {
  Message& message = answer.message;
  try {
    inputs_.of(message.tensor).read(message.block, buffer(answer.buffer).first(answer.bytes));
    message.said = Said::rows;
  } catch (const std::exception& error) {
    message.said = Said::unreadable;
    message.set_text(error.what());
  }
}

// --- the communication thread ---

void InputServer::request(int rank, const Message& message) {
  const auto bytes =
      static_cast<std::size_t>(read_bytes(inputs_.of(message.tensor).desc(), message.block));
  if (bytes > static_cast<std::size_t>(served_.buffer_bytes)) {
    throw Error(fmt::format("rank {} asks for a block of {} bytes, the plan's have up to {}", rank,
                            bytes, served_.buffer_bytes));
  }
  asked_[rank].push_back(message);
}

void InputServer::forget(int rank) { asked_.erase(rank); }

bool InputServer::poll() {
  bool did_something = false;
  for (auto answer = sending_.begin(); answer != sending_.end();) {
    (*answer)->under_way.remove_if([](Request& request) { return request.settled(); });
    if (!(*answer)->under_way.empty()) {
      ++answer;
      continue;
    }
    if ((*answer)->buffer >= 0) free_buffers_.push_back((*answer)->buffer);
    answer = sending_.erase(answer);
    did_something = true;
  }
  while (auto answer = was_read_.try_pop()) {
    --reading_;
    send(std::move(*answer));
    did_something = true;
  }
  while (take_up()) did_something = true;
  return did_something;
}

// Has the next block read that can be, or sends word that it will not be.
bool InputServer::take_up() {
  if (asked_.empty() || (free_buffers_.empty() && !refusing_)) return false;
  auto answer = next_asked();
  if (refusing_) {
    answer->message.said = Said::too_late;
    send(std::move(answer));
    return true;
  }
  answer->buffer = free_buffers_.back();
  free_buffers_.pop_back();
  ++reading_;
  to_read_.push(std::move(answer));
  return true;
}

// The next worker's after the last one served, so that none waits for all that another asks for.
std::unique_ptr<InputServer::Answer> InputServer::next_asked() {
  auto of_rank = asked_.upper_bound(last_rank_);
  if (of_rank == asked_.end()) of_rank = asked_.begin();
  auto answer = std::make_unique<Answer>();
  last_rank_ = answer->rank = of_rank->first;
  answer->message = of_rank->second.front();
  answer->bytes = static_cast<std::size_t>(
      read_bytes(inputs_.of(answer->message.tensor).desc(), answer->message.block));
  of_rank->second.pop_front();
  if (of_rank->second.empty()) asked_.erase(of_rank);
  return answer;
}

void InputServer::send(std::unique_ptr<Answer> own) {
  Answer& answer = *sending_.emplace_back(std::move(own));
  const Message& message = answer.message;
  const bool has_rows = message.said == Said::rows;
  const auto send_bytes = [&](std::span<const std::byte> data) {
    answer.under_way.push_back(communicator_.send(answer.rank, inputs_tag + message.buffer, data));
  };
  send_bytes(message.bytes());
  // Without rows this only counts the pieces.
  const std::span<const std::byte> rows(has_rows ? buffer(answer.buffer).data() : memory_,
                                        answer.bytes);
  for_each_input_piece(rows, [&](std::span<const std::byte> piece) {
    send_bytes(has_rows ? piece : piece.first(0));
  });
  if (!has_rows) return;
  ++served_.blocks;
  served_.bytes += static_cast<std::int64_t>(answer.bytes);
}

}  // namespace stream_cqsa
