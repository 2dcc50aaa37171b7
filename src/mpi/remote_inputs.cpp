#include "mpi/remote_inputs.hpp"

#include <fmt/format.h>

#include <numeric>

#include "engine/monitor.hpp"
#include "io/blocks.hpp"
#include "mpi/input_pieces.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

class RemoteInputs::Source final : public TensorSource {
 public:
  Source(TensorDesc desc, SlotTensor tensor, RemoteInputs& owner)
      : TensorSource(std::move(desc)), tensor_(tensor), owner_(owner) {}

  void read(const Block& block, std::span<std::byte> into) override {
    check_read(desc_, block, into.size());
    if (!into.empty()) owner_.read(tensor_, block, into);
  }

 private:
  SlotTensor tensor_;
  RemoteInputs& owner_;
};

RemoteInputs::RemoteInputs(const TensorDesc& query, const TensorDesc& key, const TensorDesc& value,
                           Communicator& communicator)
    : query_(std::make_unique<Source>(query, SlotTensor::query, *this)),
      key_(std::make_unique<Source>(key, SlotTensor::key, *this)),
      value_(std::make_unique<Source>(value, SlotTensor::value, *this)),
      communicator_(communicator),
      free_numbers_(most_input_requests) {
  std::iota(free_numbers_.rbegin(), free_numbers_.rend(), 0);
}

RemoteInputs::~RemoteInputs() = default;

// --- reader threads ---

void RemoteInputs::read(SlotTensor tensor, const Block& block, std::span<std::byte> into) {
  const auto exchange = std::make_shared<Exchange>();
  exchange->request.said = Said::read;
  exchange->request.tensor = tensor;
  exchange->request.block = block;
  exchange->into = into;
  std::unique_lock lock(mutex_);
  waiting_.push_back(exchange);
  changed_.wait(lock, [&] { return cancelled_ || exchange->ended; });
  if (!exchange->ended) throw Aborted{};
  if (exchange->answer.said == Said::rows) return;
  throw Error(fmt::format("rank 0 could not read for this rank: {}", exchange->answer.text.data()));
}

void RemoteInputs::cancel() {
  const std::scoped_lock lock(mutex_);
  cancelled_ = true;
  changed_.notify_all();
}

// --- the communication thread ---

void RemoteInputs::reopen() {
  const std::scoped_lock lock(mutex_);
  waiting_.clear();  // those who asked have left
  cancelled_ = false;
}

bool RemoteInputs::poll() {
  bool did_something = false;
  for (auto exchange = active_.begin(); exchange != active_.end();) {
    std::list<Request>& under_way = (*exchange)->under_way;
    under_way.remove_if([](Request& request) { return request.settled(); });
    if (!under_way.empty()) {
      ++exchange;
      continue;
    }
    end(**exchange);
    exchange = active_.erase(exchange);
    did_something = true;
  }
  while (const auto exchange = next_waiting()) {
    begin(exchange);
    did_something = true;
  }
  return did_something;
}

std::shared_ptr<RemoteInputs::Exchange> RemoteInputs::next_waiting() {
  const std::scoped_lock lock(mutex_);
  if (cancelled_) waiting_.clear();
  if (waiting_.empty() || free_numbers_.empty()) return nullptr;
  const auto exchange = waiting_.front();
  waiting_.pop_front();
  return exchange;
}

void RemoteInputs::begin(const std::shared_ptr<Exchange>& exchange) {
  active_.push_back(exchange);
  const std::int32_t number = free_numbers_.back();
  free_numbers_.pop_back();
  exchange->request.buffer = number;
  std::list<Request>& under_way = exchange->under_way;
  const auto receive = [&](std::span<std::byte> into) {
    under_way.push_back(communicator_.receive(0, inputs_tag + number, into));
  };
  receive(exchange->answer.bytes());
  for_each_input_piece(exchange->into, receive);
  under_way.push_back(communicator_.send(0, to_master_tag, exchange->request.bytes()));
}

void RemoteInputs::end(Exchange& exchange) {
  free_numbers_.push_back(exchange.request.buffer);
  // One that came too late is told to stop by another message, which cancels its wait.
  if (exchange.answer.said == Said::too_late) return;
  const std::scoped_lock lock(mutex_);
  exchange.ended = true;
  changed_.notify_all();
}

bool RemoteInputs::idle() const {
  const std::scoped_lock lock(mutex_);
  return active_.empty() && (cancelled_ || waiting_.empty());
}

}  // namespace stream_cqsa
