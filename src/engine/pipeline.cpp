#include "engine/pipeline.hpp"

#include <algorithm>
#include <array>
#include <set>
#include <span>

namespace stream_cqsa {
namespace {

// How far schedule may be ahead of submit, so that files are read in time: a step holds a
// subproblem's pairs, 12 bytes for each chunk of the division, and a copy about 100 bytes. The host
// cache bounds copies, too, each of which pins a block.
constexpr std::size_t steps_ahead = 8;
constexpr std::size_t orders_ahead = 4096;

// From so many bytes on a copy takes a device longer than submitting it takes the host. What is
// copied together is free for other blocks together, so it is a small part of the host cache.
constexpr std::int64_t bytes_together = std::int64_t{4} << 20;
constexpr std::size_t share_together = 8;

// Q is the query side; K and V share a slot.
std::span<const SlotTensor> tensors_on(Side side) {
  static constexpr std::array tensors = {SlotTensor::query, SlotTensor::key, SlotTensor::value};
  return std::span(tensors).subspan(side == Side::query ? 0 : 1, side == Side::query ? 1 : 2);
}

std::vector<bool> chunks_on(Side side, const QuorumWork& work) {
  std::vector<bool> on(work.chunks.size(), false);
  for (const ChunkPair& pair : work.pairs) {
    on[static_cast<std::size_t>(side == Side::query ? pair.query : pair.key)] = true;
  }
  return on;
}

}  // namespace

Pipeline::Pipeline(const Plan& plan, const Inputs& inputs, std::byte* cache_memory,
                   Backend& backend, PartialReceiver& receiver, Telemetry& telemetry, Abort& abort)
    : plan_(plan),
      inputs_(inputs),
      backend_(backend),
      receiver_(receiver),
      telemetry_(telemetry),
      uses_(plan),
      query_slots_(plan.device.query_slots),
      kv_slots_(plan.device.kv_slots),
      query_last_use_(static_cast<std::size_t>(plan.device.query_slots), Ticket{Lane::compute, 0}),
      kv_last_use_(static_cast<std::size_t>(plan.device.kv_slots), Ticket{Lane::compute, 0}),
      in_flight_(backend),
      cache_(plan, inputs, cache_memory, backend, telemetry, abort),
      steps_ahead_(abort, std::vector<Permit>(steps_ahead)),
      orders_(abort, orders_ahead),
      launched_(abort, static_cast<std::size_t>(plan.device.state_slots)),
      state_slots_(abort, static_cast<std::size_t>(plan.device.state_slots)) {
  for (std::int32_t slot = 0; slot < plan.device.state_slots; ++slot) {
    state_slots_.push({slot, Ticket{Lane::copy_out, 0}});
  }
  if (plan.placement == AccumulatorPlacement::device) {
    accumulators_.emplace(plan, backend, receiver, telemetry, abort);
  }
}

void Pipeline::start(Crew& crew, NextSubproblem next, int read_threads,
                     std::function<void()> finished) {
  crew.start([this, next = std::move(next)] { schedule(next); });
  for (int i = 0; i < std::max(read_threads, 1); ++i) crew.start([this] { cache_.read_blocks(); });
  crew.start([this] { submit(); });
  crew.start([this, finished = std::move(finished)] {
    drain();
    finished();
  });
}

// --- schedule ---

void Pipeline::schedule(const NextSubproblem& next) {
  while (const auto assignment = next()) {
    const QuorumWork work = plan_.work(assignment->id);
    auto parts = parts_of(*assignment, work);
    std::vector<std::vector<bool>> keys_later(parts.size(),
                                              std::vector<bool>(work.chunks.size(), false));
    for (std::size_t part = parts.size(); part-- > 1;) {
      keys_later[part - 1] = keys_later[part];
      for (const ChunkPair& pair : parts[part])
        keys_later[part - 1][static_cast<std::size_t>(pair.key)] = true;
    }
    for (std::size_t part = 0; part < parts.size(); ++part) {
      steps_ahead_.take();
      auto step = std::make_unique<Step>(Step{assignment->id,
                                              assignment->order,
                                              plan_.key(assignment->id),
                                              {work.chunks, std::move(parts[part])},
                                              std::move(keys_later[part]),
                                              part + 1 == parts.size(),
                                              {},
                                              {}});
      step->query_slots = assign_slots(*step, Side::query);
      step->kv_slots = assign_slots(*step, Side::key);
      orders_.push({{}, std::move(step)});
    }
  }
  cache_.close();
  orders_.close();
}

std::vector<std::vector<ChunkPair>> Pipeline::parts_of(const Assignment& assignment,
                                                       const QuorumWork& work) const {
  const auto is_wanted = [&](std::int32_t query) {
    return assignment.wanted.empty() || assignment.wanted[static_cast<std::size_t>(query)];
  };
  std::set<std::int32_t> wanted;
  for (const ChunkPair& pair : work.pairs) {
    if (is_wanted(pair.query)) wanted.insert(pair.query);
  }
  const std::int64_t at_once =
      plan_.device.queries_at_once(static_cast<std::int64_t>(wanted.size()));
  std::vector<std::vector<ChunkPair>> parts;
  std::set<std::int32_t> queries, keys;  // of the last part
  for (auto begin = work.pairs.begin(); begin != work.pairs.end();) {
    const std::int32_t query = begin->query;
    const auto end = std::find_if(begin, work.pairs.end(),
                                  [query](const ChunkPair& pair) { return pair.query != query; });
    const std::span<const ChunkPair> pairs(begin, end);
    begin = end;
    if (!is_wanted(query)) continue;
    std::set<std::int32_t> together = keys;
    for (const ChunkPair& pair : pairs) together.insert(pair.key);
    if (parts.empty() || static_cast<std::int64_t>(queries.size()) == at_once ||
        static_cast<std::int64_t>(together.size()) > plan_.device.kv_slots) {
      parts.emplace_back();
      queries.clear();
      together.clear();
      for (const ChunkPair& pair : pairs) together.insert(pair.key);
    }
    parts.back().insert(parts.back().end(), pairs.begin(), pairs.end());
    queries.insert(query);
    keys = std::move(together);
  }
  return parts;
}

std::vector<std::int32_t> Pipeline::assign_slots(const Step& step, Side side) {
  const std::vector<bool> needed = chunks_on(side, step.work);
  const auto [batch, group, quorum] = step.key;
  std::vector<SlotCache::Need> needs;
  std::vector<std::size_t> positions;
  for (std::size_t position = 0; position < needed.size(); ++position) {
    if (!needed[position]) continue;
    const std::int64_t chunk = step.work.chunks[position].index;
    const bool later = side == Side::key && step.keys_later[position];
    needs.push_back(
        {{batch, group, chunk}, later ? step.id : uses_.next(side, batch, group, chunk, step.id)});
    positions.push_back(position);
  }
  const auto assigned = (side == Side::query ? query_slots_ : kv_slots_).assign(needs, step.id);
  std::vector<std::int32_t> slots(needed.size(), -1);
  for (std::size_t i = 0; i < assigned.size(); ++i) {
    const auto [slot, load] = assigned[i];
    slots[positions[i]] = slot;
    for (const SlotTensor tensor : tensors_on(side)) {
      const ChunkRows rows = rows_of(step, tensor, positions[i]);
      if (load) {
        order_copies(step, rows, slot);
      } else {
        pass_over(rows);
      }
    }
  }
  return slots;
}

Pipeline::ChunkRows Pipeline::rows_of(const Step& step, SlotTensor tensor, std::size_t position) {
  const Chunk& chunk = step.work.chunks[position];
  const TensorSource& source = inputs_.of(tensor);
  const bool query = tensor == SlotTensor::query;
  const Side side = query ? Side::query : Side::key;
  const auto [batch, group, quorum] = step.key;
  const HeadGroup& head_group = plan_.groups[static_cast<std::size_t>(group)];
  ChunkRows rows;
  rows.tensor = tensor;
  rows.heads = query ? head_group.query_heads(plan_.problem()) : head_group.kv_heads();
  rows.whole = {batch, query ? chunk.queries : chunk.keys, rows.heads};
  rows.resident = source.resident(rows.whole).has_value();
  if (rows.resident) return rows;
  rows.whole.heads = source.desc().readable_heads(rows.heads);
  if (!query && step.keys_later[position]) {
    rows.next_use = step.id;
    return rows;
  }
  rows.next_use = rows.whole.heads == rows.heads
                      ? uses_.next(side, batch, group, chunk.index, step.id)
                      : uses_.next_of_any_group(side, batch, chunk.index, step.id);
  return rows;
}

template <typename Visit>
void Pipeline::for_each_block(const ChunkRows& rows, const Visit& visit) const {
  const std::int64_t block_tokens =
      rows.tensor == SlotTensor::query ? plan_.query_block_tokens : plan_.key_block_tokens;
  const Range tokens = rows.whole.tokens;
  for (std::int64_t at = tokens.begin; at < tokens.end; at += block_tokens) {
    visit({rows.whole.batch, {at, std::min(at + block_tokens, tokens.end)}, rows.whole.heads});
  }
}

void Pipeline::order_copies(const Step& step, const ChunkRows& rows, std::int32_t slot) {
  const Range tokens = rows.whole.tokens;
  Copy copy{step.id, rows.tensor, rows.heads, rows.whole, slot, tokens.size(), 0, -1};
  if (rows.resident) {
    orders_.push({copy, nullptr});
    return;
  }
  for_each_block(rows, [&](const Block& block) {
    copy.block = block;
    copy.first_token = block.tokens.begin - tokens.begin;
    copy.cached = cache_.request(rows.tensor, block, step.id, rows.next_use);
    orders_.push({copy, nullptr});
  });
}

void Pipeline::pass_over(const ChunkRows& rows) {
  if (rows.resident) return;
  for_each_block(rows,
                 [&](const Block& block) { cache_.pass_over(rows.tensor, block, rows.next_use); });
}

// --- submit ---

void Pipeline::submit() {
  Ticket last_copy{Lane::copy_in, 0};
  while (auto order = orders_.pop()) {
    if (!order->launch) {
      last_copy = submit_copies(order->copy);
      continue;
    }
    const std::vector<StateSlot> free = wait_for_state_slots(*order->launch);
    steps_ahead_.give({});
    if (begins_ && !begins_(order->launch->order)) {
      for (const StateSlot& slot : free) state_slots_.push(slot);
      continue;
    }
    Launched launched = launch(std::move(*order->launch), free, last_copy);
    if (accumulators_) {
      accumulators_->add(launched);
    } else {
      launched_.push(std::move(launched));
    }
  }
  if (accumulators_) {
    accumulators_->close();
  } else {
    launched_.close();
  }
}

// With what comes next into the same rows of the slot, as far as that need not be waited for.
Ticket Pipeline::submit_copies(const Copy& first) {
  CopyIn copy{first.subproblem,   first.tensor,      first.slot,
              first.heads.size(), first.slot_tokens, {}};
  const std::int64_t vector =
      plan_.problem().head_dim * size_of(storage_type(plan_.problem().dtype));
  const std::size_t most =
      std::max<std::size_t>(1, static_cast<std::size_t>(plan_.host.cache_blocks) / share_together);
  std::vector<std::int32_t> cached;
  std::int64_t bytes = 0;
  std::optional<Copy> next = first;
  while (next) {
    StridedRows rows = next->cached < 0 ? *inputs_.of(next->tensor).resident(next->block)
                                        : cache_.wait_read(next->cached);
    rows.data += (next->heads.begin - next->block.heads.begin) * rows.head_stride;
    copy.rows.push_back({next->first_token, next->block.tokens.size(), rows});
    if (next->cached >= 0) cached.push_back(next->cached);
    bytes += next->block.tokens.size() * next->heads.size() * vector;
    const bool enough = bytes >= bytes_together || cached.size() >= most;
    next = enough ? std::nullopt : next_copy(first);
  }
  const auto& last_use = first.tensor == SlotTensor::query ? query_last_use_ : kv_last_use_;
  const Ticket ticket =
      backend_.copy_in(copy, std::span(&last_use[static_cast<std::size_t>(first.slot)], 1));
  for (const std::int32_t block : cached) cache_.release(block, ticket);
  return ticket;
}

std::optional<Pipeline::Copy> Pipeline::next_copy(const Copy& before) {
  const auto order = orders_.try_pop_if([&](const Order& next) {
    return !next.launch && next.copy.subproblem == before.subproblem &&
           next.copy.tensor == before.tensor && next.copy.slot == before.slot &&
           (next.copy.cached < 0 || cache_.is_read(next.copy.cached));
  });
  return order ? std::optional(order->copy) : std::nullopt;
}

std::vector<Pipeline::StateSlot> Pipeline::wait_for_state_slots(const Step& step) {
  std::vector<StateSlot> free;
  if (accumulators_) return free;
  const std::vector<bool> needed = chunks_on(Side::query, step.work);
  const auto count = static_cast<std::size_t>(std::count(needed.begin(), needed.end(), true));
  while (free.size() < count) free.push_back(*state_slots_.pop());
  return free;
}

Launched Pipeline::launch(Step step, const std::vector<StateSlot>& free, Ticket last_copy) {
  const std::size_t chunks = step.work.chunks.size();
  std::vector<std::int32_t> state_slots(chunks, -1);
  std::vector<Ticket> after = {last_copy};
  for (const StateSlot& slot : free) after.push_back(slot.last_copy_out);
  WorkList list;
  list.subproblem = step.id;
  list.heads = plan_.groups[static_cast<std::size_t>(step.key.group)];
  for (const ChunkPair& pair : step.work.pairs) {
    const auto query = static_cast<std::size_t>(pair.query);
    const auto key = static_cast<std::size_t>(pair.key);
    if (state_slots[query] < 0) {
      state_slots[query] =
          accumulators_ ? accumulators_->take_slot() : free[list.queries.size()].number;
      list.queries.push_back({step.query_slots[query], state_slots[query],
                              step.work.chunks[query].queries,
                              static_cast<std::int64_t>(list.keys.size()), 0});
    }
    list.keys.push_back(
        {step.kv_slots[key], step.work.chunks[key].keys, pair.liveness == Liveness::partial});
    ++list.queries.back().key_count;
  }
  const Ticket ticket = backend_.launch(std::move(list), after);
  for (std::size_t i = 0; i < chunks; ++i) {
    if (step.query_slots[i] >= 0)
      query_last_use_[static_cast<std::size_t>(step.query_slots[i])] = ticket;
    if (step.kv_slots[i] >= 0) kv_last_use_[static_cast<std::size_t>(step.kv_slots[i])] = ticket;
  }
  return {step.id, step.key, std::move(step.work), ticket, std::move(state_slots), step.last};
}

// --- drain ---

void Pipeline::drain() {
  if (accumulators_) return accumulators_->drain();
  in_flight_.serve(launched_, [this](const Launched& launched) {
    for (std::size_t i = 0; i < launched.state_slots.size(); ++i) {
      if (launched.state_slots[i] >= 0) copy_out(launched, static_cast<std::int32_t>(i));
    }
    if (!launched.last) return;
    in_flight_.add(launched.ticket, [this, id = launched.id] {
      telemetry_.add_subproblem();  // first: the receiver may tell what has been done so far
      receiver_.end_of_subproblem(id);
    });
  });
}

// Behind the launch, which need not have ended yet.
void Pipeline::copy_out(const Launched& launched, std::int32_t position) {
  const auto at = static_cast<std::size_t>(position);
  const Chunk& chunk = launched.work.chunks[at];
  const auto [batch, group, quorum] = launched.key;
  const HeadGroup& heads = plan_.groups[static_cast<std::size_t>(group)];
  const std::int64_t head_count = heads.query_heads(plan_.problem()).size();
  const std::int64_t slot_rows = chunk.queries.size() * head_count;
  const std::int64_t dim = plan_.problem().head_dim;
  Ticket copied{Lane::copy_out, 0};
  for (std::int64_t piece = 0; piece < piece_count(plan_, chunk.queries); ++piece) {
    const PieceKey key{batch, group, chunk.index, piece};
    const Range queries = piece_range(plan_, key);
    const auto buffer = in_flight_.take<PartialReceiver::Buffer>(
        [this](auto& free) { return receiver_.try_buffer(free); },
        [this] { return receiver_.wait_buffer(); });
    const SoftmaxStates into = softmax_states_at(buffer.data, queries.size() * head_count, dim);
    copied = backend_.copy_out({launched.id, launched.state_slots[at], slot_rows,
                                (queries.begin - chunk.queries.begin) * head_count, into},
                               std::span(&launched.ticket, 1));
    const std::int64_t scores = scores_of(plan_, launched, position, queries);
    in_flight_.add(copied, [this, head_count,
                            partial = Partial{key, launched.id, scores, buffer.number, into}] {
      telemetry_.add_scores(static_cast<std::uint64_t>(partial.scores) *
                            static_cast<std::uint64_t>(head_count));
      receiver_.deliver(partial);
    });
  }
  state_slots_.push({launched.state_slots[at], copied});
}

}  // namespace stream_cqsa
