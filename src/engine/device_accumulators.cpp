#include "engine/device_accumulators.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <span>
#include <stdexcept>

namespace stream_cqsa {
namespace {

// Launches that are submitted and not complete: enough that the device never waits for a
// submission. Each keeps its work list.
constexpr std::size_t launches_under_way = 3;

}  // namespace

DeviceAccumulators::DeviceAccumulators(const Plan& plan, Backend& backend,
                                       PartialReceiver& receiver, Telemetry& telemetry,
                                       Abort& abort)
    : plan_(plan),
      backend_(backend),
      receiver_(receiver),
      telemetry_(telemetry),
      uses_(plan),
      free_slots_(static_cast<std::size_t>(plan.device.state_slots)),
      in_flight_(backend),
      output_slots_(abort, static_cast<std::size_t>(plan.device.output_slots)),
      // A finished chunk keeps an output slot until it is popped: pushing one never waits for long.
      items_(abort, static_cast<std::size_t>(plan.device.output_slots) + launches_under_way + 1) {
  std::iota(free_slots_.rbegin(), free_slots_.rend(), 0);
  for (std::int32_t slot = 0; slot < plan.device.output_slots; ++slot) {
    output_slots_.push({slot, Ticket{Lane::copy_out, 0}});
  }
}

// --- the submitting thread ---

std::int32_t DeviceAccumulators::take_slot() {
  if (free_slots_.empty()) throw std::logic_error("the plan has too few state slots");
  const std::int32_t slot = free_slots_.back();
  free_slots_.pop_back();
  return slot;
}

void DeviceAccumulators::add(const Launched& launched) {
  for (std::size_t i = 0; i < launched.state_slots.size(); ++i) {
    if (launched.state_slots[i] >= 0) merge(launched, static_cast<std::int32_t>(i));
  }
  // After the chunks that it finishes: drain is to submit their copies before it waits for it.
  items_.push({launched.id, launched.ticket, scores_of_launch(launched), -1, {}, {}});
  under_way_.push_back(launched.ticket);
  if (under_way_.size() < launches_under_way) return;
  backend_.wait(under_way_.front());
  under_way_.pop_front();
}

void DeviceAccumulators::merge(const Launched& launched, std::int32_t position) {
  const auto at = static_cast<std::size_t>(position);
  const auto [batch, group, quorum] = launched.key;
  const ChunkKey key{batch, group, launched.work.chunks[at].index};
  const std::int32_t slot = launched.state_slots[at];
  const QuorumList quorums = uses_.quorums(Side::query, key.chunk);
  Open& open = open_[key];
  if (open.merged >= quorums.size() || quorums[open.merged] != quorum) {
    throw std::logic_error(fmt::format("subproblem {} is merged into query chunk {} out of turn",
                                       launched.id, key.chunk));
  }
  if (open.merged == 0) {
    const Range queries = launched.work.chunks[at].queries;
    open.slot = slot;
    open.piece_scores.assign(static_cast<std::size_t>(piece_count(plan_, queries)), 0);
  } else {
    backend_.merge({launched.id, slot, open.slot, rows_of(key)}, {});
    free_slots_.push_back(slot);
  }
  for (std::size_t piece = 0; piece < open.piece_scores.size(); ++piece) {
    const Range queries =
        piece_range(plan_, {batch, group, key.chunk, static_cast<std::int64_t>(piece)});
    open.piece_scores[piece] += scores_of(plan_, launched, position, queries);
  }
  if (++open.merged < quorums.size()) return;
  finalise(launched.id, key, std::move(open));
  open_.erase(key);
}

void DeviceAccumulators::finalise(std::int64_t subproblem, const ChunkKey& key, Open open) {
  const Range queries = plan_.division.chunk(key.chunk).queries;
  const std::int64_t keyless = keyless_tokens(plan_.problem(), queries);
  const OutputSlot to = *output_slots_.pop();
  const Ticket ticket = backend_.finalise(
      {subproblem, open.slot, rows_of(key), keyless * heads_of(key.group), to.number},
      std::span(&to.last_copy_out, 1));
  free_slots_.push_back(open.slot);
  items_.push({subproblem, ticket, 0, to.number, key, std::move(open.piece_scores)});
}

std::uint64_t DeviceAccumulators::scores_of_launch(const Launched& launched) const {
  std::int64_t scores = 0;
  for (const ChunkPair& pair : launched.work.pairs) {
    scores += plan_.problem().live_scores(
        launched.work.chunks[static_cast<std::size_t>(pair.query)].queries,
        launched.work.chunks[static_cast<std::size_t>(pair.key)].keys);
  }
  return static_cast<std::uint64_t>(scores) *
         static_cast<std::uint64_t>(heads_of(launched.key.group));
}

std::int64_t DeviceAccumulators::heads_of(std::int64_t group) const {
  return plan_.groups[static_cast<std::size_t>(group)].query_heads(plan_.problem()).size();
}

std::int64_t DeviceAccumulators::rows_of(const ChunkKey& key) const {
  return plan_.division.chunk(key.chunk).queries.size() * heads_of(key.group);
}

// --- drain ---

void DeviceAccumulators::drain() {
  in_flight_.serve(items_, [this](const Item& item) {
    if (item.output_slot >= 0) return copy_out(item);
    in_flight_.add(item.ticket, [this, scores = item.scores] {
      telemetry_.add_scores(scores);
      telemetry_.add_subproblem();
    });
  });
}

// Behind the finishing, which need not have ended yet.
void DeviceAccumulators::copy_out(const Item& item) {
  const auto [batch, group, chunk] = item.chunk;
  const std::int64_t chunk_rows = rows_of(item.chunk);
  std::int64_t first_row = 0;
  Ticket copied{Lane::copy_out, 0};
  for (std::size_t piece = 0; piece < item.piece_scores.size(); ++piece) {
    const PieceKey key{batch, group, chunk, static_cast<std::int64_t>(piece)};
    const std::int64_t rows = piece_rows(plan_, key);
    const auto buffer = in_flight_.take<PartialReceiver::Buffer>(
        [this](auto& free) { return receiver_.try_output_buffer(free); },
        [this] { return receiver_.wait_output_buffer(); });
    const FinishedStates into = finished_at(plan_, key, buffer.data);
    copied = backend_.copy_out_rows({item.subproblem, item.output_slot, chunk_rows, first_row, rows,
                                     into.output, into.m, into.l},
                                    std::span(&item.ticket, 1));
    const FinishedRows finished{key, item.piece_scores[piece], buffer.number};
    in_flight_.add(copied, [this, finished] { receiver_.deliver_finished(finished); });
    first_row += rows;
  }
  output_slots_.push({item.output_slot, copied});
}

}  // namespace stream_cqsa
