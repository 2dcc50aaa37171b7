#include "mpi/intake.hpp"

#include <algorithm>
#include <utility>

namespace stream_cqsa {

namespace {

// Pieces that one subproblem may have on this rank.
std::int64_t most_pieces(const Plan& plan) {
  std::int64_t pieces = 0;
  const Range chunks = plan.merged_chunks;
  for (std::int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk)
    pieces = std::max(pieces, piece_count(plan, plan.division.chunk(chunk).queries));
  return pieces * std::min(plan.division.quorum_size(), chunks.size());
}

std::int64_t window_of(const Plan& plan) {
  // One buffer is left for partials that are merged as they come, and one for those dropped.
  const std::int64_t pieces = most_pieces(plan);
  if (computes_by_groups(plan)) return plan.subproblem_count();  // finished rows need not wait
  return pieces > 0 ? (plan.host.state_buffers - 2) / pieces : plan.subproblem_count();
}

}  // namespace

Intake::Intake(const Plan& plan, Assembler& assembler, Communicator& communicator,
               Telemetry& telemetry, Received received)
    : plan_(plan),
      assembler_(assembler),
      communicator_(communicator),
      telemetry_(telemetry),
      received_(std::move(received)),
      window_(window_of(plan)),
      spare_(computes_by_groups(plan) ? assembler.wait_output_buffer() : assembler.wait_buffer()) {
  merged();
}

void Intake::merged() {
  while (oldest_ < plan_.subproblem_count() && assembler_.is_merged(oldest_)) ++oldest_;
  changed_ = true;
}

void Intake::offer(int rank, const Message& message) {
  const Source source{message.subproblem, rank, message.order};
  offers_.emplace(source, Offer{message, dropped_.contains(source)});
  changed_ = true;
}

void Intake::computed(int rank, const Message& message) {
  count({message.subproblem, rank, message.order}, 0, message.count);
}

void Intake::count(const Source& source, std::int64_t came, std::int64_t of) {
  Count& count = counts_[source];
  count.came += came;
  if (of >= 0) count.of = of;
  if (count.came != count.of) return;
  counts_.erase(source);
  dropped_.erase(source);
  received_(source);
}

void Intake::drop(const Source& source) {
  dropped_.insert(source);
  const auto [begin, end] = offers_.equal_range(source);
  for (auto offer = begin; offer != end; ++offer) offer->second.dropped = true;
  changed_ = true;
}

void Intake::forget(int rank) {
  std::erase_if(offers_, [&](const auto& offer) { return offer.first.rank == rank; });
  std::erase_if(counts_, [&](const auto& count) { return count.first.rank == rank; });
  std::erase_if(dropped_, [&](const auto& source) { return source.rank == rank; });
  for (Transfer& transfer : transfers_) {
    if (transfer.source.rank != rank || transfer.forgotten) continue;
    transfer.forgotten = true;
    transfer.request.cancel();
  }
  changed_ = true;
}

bool Intake::poll() {
  const bool moved = move_transfers();
  changed_ |= moved;
  const std::uint64_t changes = assembler_.changes();
  // Nothing else lets an offer in that was not let in before.
  if (!std::exchange(changed_, false) && changes == changes_) return moved;
  changes_ = changes;
  return begin_transfers() || moved;
}

bool Intake::move_transfers() {
  bool did_something = false;
  for (auto transfer = transfers_.begin(); transfer != transfers_.end();) {
    const Request::State state = transfer->request.test();
    if (state == Request::State::pending) {
      ++transfer;
      continue;
    }
    if (transfer->forgotten || state == Request::State::lost) {
      give_up(*transfer);
    } else {
      end(*transfer);
    }
    transfer = transfers_.erase(transfer);
    did_something = true;
  }
  if (did_something && transfers_.empty()) {
    telemetry_.record(Stage::transfer, {busy_since_, now_seconds()},
                      std::exchange(bytes_under_way_, 0), -1);
  }
  return did_something;
}

bool Intake::begin_transfers() {
  bool did_something = false;
  const bool was_stalled = std::exchange(no_room_, false);
  for (auto offer = offers_.begin(); offer != offers_.end();) {
    const bool begun = begin(offer->first, offer->second);
    did_something |= begun;
    offer = begun ? offers_.erase(offer) : std::next(offer);
  }
  if (no_room_ != was_stalled) {
    const double now = now_seconds();
    if (was_stalled) stalled_ += now - stalled_since_;
    stalled_since_ = now;
  }
  return did_something;
}

// Asks for the states of an offer, if there is use and room for them, or none will ever be.
bool Intake::begin(const Source& source, const Offer& offer) {
  const Message& message = offer.message;
  if (offer.dropped || dropping_) return receive_dropped(source, message);
  if (coming_.contains({message.piece, message.subproblem})) return false;
  if (computes_by_groups(plan_)) return begin_finished(source, message);
  const bool in_window = message.subproblem < oldest_ + window_;
  Assembler::Turn turn = assembler_.turn_of(message.piece, message.subproblem);
  if (turn == Assembler::Turn::past) return receive_dropped(source, message);
  if (turn == Assembler::Turn::early && !in_window) return false;
  PartialReceiver::Buffer buffer;
  if (!assembler_.try_buffer(buffer)) return wait_for_room();
  turn = assembler_.admit(message.piece, message.subproblem);
  if (turn == Assembler::Turn::past || (turn == Assembler::Turn::early && !in_window)) {
    assembler_.give_back(buffer.number);
    return false;
  }
  begin_transfer(source, message, buffer, false);
  coming_.emplace(message.piece, message.subproblem);
  return true;
}

bool Intake::wait_for_room() {
  no_room_ = true;
  return false;
}

bool Intake::begin_finished(const Source& source, const Message& message) {
  if (assembler_.has_finished(message.piece)) return receive_dropped(source, message);
  PartialReceiver::Buffer buffer;
  if (!assembler_.try_output_buffer(buffer)) return wait_for_room();
  begin_transfer(source, message, buffer, false);
  coming_.emplace(message.piece, message.subproblem);
  return true;
}

bool Intake::receive_dropped(const Source& source, const Message& message) {
  if (spare_in_use_) return false;
  spare_in_use_ = true;
  begin_transfer(source, message, spare_, true);
  return true;
}

void Intake::begin_transfer(const Source& source, const Message& message,
                            PartialReceiver::Buffer buffer, bool dropped) {
  const std::int64_t bytes =
      computes_by_groups(plan_)
          ? finished_bytes(plan_, message.piece)
          : softmax_state_bytes(piece_rows(plan_, message.piece), plan_.problem().head_dim);
  const std::span<std::byte> into(buffer.data, static_cast<std::size_t>(bytes));
  if (transfers_.empty()) busy_since_ = now_seconds();
  transfers_.push_back({communicator_.receive(source.rank, states_tag + message.buffer, into),
                        source, message, dropped, buffer, bytes, false});
}

// The partial will be computed again. An accumulator that is kept for it stays kept.
void Intake::give_up(const Transfer& transfer) {
  if (transfer.dropped) {
    spare_in_use_ = false;
    return;
  }
  coming_.erase({transfer.message.piece, transfer.message.subproblem});
  give_back(transfer.buffer.number);
}

void Intake::give_back(std::int32_t buffer) {
  if (computes_by_groups(plan_)) return assembler_.give_back_output(buffer);
  assembler_.give_back(buffer);
}

void Intake::end(Transfer& transfer) {
  const Message& message = transfer.message;
  bytes_under_way_ += transfer.bytes;
  if (transfer.dropped) {
    spare_in_use_ = false;
  } else if (dropping_) {
    give_back(transfer.buffer.number);
  } else {
    const HeadGroup& heads = plan_.groups[static_cast<std::size_t>(message.piece.group)];
    telemetry_.add_scores(static_cast<std::uint64_t>(message.scores) *
                          static_cast<std::uint64_t>(heads.query_heads(plan_.problem()).size()));
    coming_.erase({message.piece, message.subproblem});
    deliver(message, transfer.buffer);
  }
  count(transfer.source, 1, -1);
}

void Intake::deliver(const Message& message, PartialReceiver::Buffer buffer) {
  if (computes_by_groups(plan_))
    return assembler_.deliver_finished({message.piece, message.scores, buffer.number});
  assembler_.deliver(
      {message.piece, message.subproblem, message.scores, buffer.number,
       softmax_states_at(buffer.data, piece_rows(plan_, message.piece), plan_.problem().head_dim)});
}

}  // namespace stream_cqsa
