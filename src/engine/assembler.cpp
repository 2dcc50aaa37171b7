#include "engine/assembler.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace stream_cqsa {
namespace {

std::vector<std::int32_t> numbers_down_from(std::int64_t count) {
  std::vector<std::int32_t> numbers(static_cast<std::size_t>(count));
  std::iota(numbers.rbegin(), numbers.rend(), 0);
  return numbers;
}

// A merge thread holds one accumulator at a time; with a single partial a piece, none. With
// accumulators on the device nothing is left to merge: one sees the end of the partials.
int merge_threads_for(const Plan& plan, const RunOptions& options) {
  if (plan.placement == AccumulatorPlacement::device) return 1;
  const bool merging = plan.division.most_partials() > 1;
  const std::int64_t most = merging ? plan.host.accumulators : options.merge_threads;
  return static_cast<int>(
      std::max<std::int64_t>(1, std::min<std::int64_t>(options.merge_threads, most)));
}

// Each holds an output buffer.
int write_threads_for(const Plan& plan, const RunOptions& options) {
  return static_cast<int>(std::max<std::int64_t>(
      1, std::min<std::int64_t>(options.write_threads, plan.host.output_buffers)));
}

}  // namespace

Assembler::Assembler(const Plan& plan, const Outputs& outputs, std::byte* memory,
                     const RunOptions& options, Telemetry& telemetry, Abort& abort)
    : plan_(plan),
      outputs_(outputs),
      memory_(memory),
      merge_threads_(merge_threads_for(plan, options)),
      write_threads_(write_threads_for(plan, options)),
      telemetry_(telemetry),
      checkpoint_options_(options.checkpoint),
      pieces_(plan),
      monitor_(abort),
      uses_(plan),
      merged_(static_cast<std::size_t>(pieces_.count()), 0),
      open_(plan, plan.placement != AccumulatorPlacement::memory ||
                      !options.checkpoint.directory.empty()),
      merged_scores_(static_cast<std::size_t>(plan.division.chunk_count()), 0),
      pieces_left_(plan.groups_done > 0 ? pieces_with_partials(plan.groups_done) : pieces_.count()),
      store_(plan, memory + plan.host.accumulator_offset(), options, telemetry, abort),
      state_buffers_(abort, numbers_down_from(plan.host.state_buffers)),
      output_buffers_(abort, numbers_down_from(plan.host.output_buffers)),
      ready_(abort, static_cast<std::size_t>(plan.host.state_buffers) + 1),
      finished_(abort, static_cast<std::size_t>(plan.host.output_buffers) + 1) {
  if (!checkpoint_options_.directory.empty()) resume();
}

void Assembler::start(Crew& crew) {
  producers_ = merge_threads_ + 1;
  crew.start([this] {
    finish_keyless();
    end_producer();
  });
  for (int i = 0; i < merge_threads_; ++i) {
    crew.start([this] {
      while (const auto partial = ready_.pop()) merge_chain(*partial);
      end_producer();
    });
  }
  writers_ = write_threads_;
  for (int i = 0; i < write_threads_; ++i) crew.start([this] { write_pieces(); });
  if (checkpoint_) crew.start([this] { keep_checkpoint(); });
}

void Assembler::leave_from(std::int64_t group) {
  const std::int64_t left = pieces_with_partials(group) - finished_from(group);
  const auto lock = monitor_.lock();
  pieces_left_ -= left;
}

std::int64_t Assembler::pieces_with_partials(std::int64_t group) const {
  return (group_total(plan_) - group) * pieces_of_group(plan_, plan_.merged_chunks);
}

RunSoFar Assembler::so_far() const {
  RunSoFar run;
  run.totals = telemetry_.totals();
  run.scores = telemetry_.scores_done();
  run.merge_threads = merge_threads_;
  run.write_threads = write_threads_;
  return run;
}

void Assembler::end_of_partials() { ready_.close(); }

// --- buffers ---

bool Assembler::try_buffer(Buffer& buffer) {
  const auto number = state_buffers_.try_take();
  if (!number) return false;
  buffer = {*number, memory_ + plan_.host.state_offset() + *number * plan_.host.state_buffer_bytes};
  return true;
}

PartialReceiver::Buffer Assembler::wait_buffer() {
  const std::int32_t number = state_buffers_.take();
  return {number, memory_ + plan_.host.state_offset() + number * plan_.host.state_buffer_bytes};
}

bool Assembler::try_output_buffer(Buffer& buffer) {
  const auto number = output_buffers_.try_take();
  if (!number) return false;
  buffer = {*number, output_at(*number)};
  return true;
}

PartialReceiver::Buffer Assembler::wait_output_buffer() {
  const std::int32_t number = output_buffers_.take();
  return {number, output_at(number)};
}

void Assembler::give_back(std::int32_t buffer) {
  state_buffers_.give(buffer);
  ++changes_;
}

void Assembler::give_back_output(std::int32_t buffer) {
  output_buffers_.give(buffer);
  ++changes_;
}

// --- merging ---

std::int64_t Assembler::subproblem_of(const PieceKey& key, std::int64_t quorum) const {
  return plan_.id({key.batch, key.group, quorum});
}

// Under the lock: merged, being merged, waiting to be, or never to come.
bool Assembler::has(const PieceKey& key, std::int64_t quorum) const {
  const QuorumList quorums = uses_.quorums(Side::query, key.chunk);
  const auto merged = quorums.begin() + merged_[static_cast<std::size_t>(pieces_.number(key))];
  if (!std::binary_search(merged, quorums.end(), quorum)) return true;
  const auto at = entries_.find(key);
  if (at == entries_.end()) return false;
  return (at->second.busy && quorum == *merged) ||
         at->second.early.contains(subproblem_of(key, quorum));
}

// Under the lock.
Assembler::Turn Assembler::turn(const PieceKey& key, std::int64_t quorum) const {
  if (has(key, quorum)) return Turn::past;
  const auto merged =
      static_cast<std::size_t>(merged_[static_cast<std::size_t>(pieces_.number(key))]);
  const QuorumList quorums = uses_.quorums(Side::query, key.chunk);
  const auto at = entries_.find(key);
  const bool busy = at != entries_.end() && at->second.busy;
  if (busy || quorum != quorums[merged]) return Turn::early;
  if (!begins(key) || admitted_.contains(key) || open_.may_begin(key)) return Turn::next;
  return Turn::early;
}

// Under the lock: its next partial needs an accumulator.
bool Assembler::begins(const PieceKey& key) const {
  return merged_[static_cast<std::size_t>(pieces_.number(key))] == 0 &&
         uses_.quorums(Side::query, key.chunk).size() > 1;
}

Assembler::Turn Assembler::turn_of(const PieceKey& key, std::int64_t subproblem) const {
  const auto lock = monitor_.lock();
  return turn(key, plan_.key(subproblem).quorum);
}

Assembler::Turn Assembler::admit(const PieceKey& key, std::int64_t subproblem) {
  const auto lock = monitor_.lock();
  const Turn turn = this->turn(key, plan_.key(subproblem).quorum);
  if (turn == Turn::next && begins(key) && admitted_.insert(key).second) open_.begin(key);
  return turn;
}

bool Assembler::is_merged(std::int64_t subproblem) const {
  const auto [batch, group, quorum] = plan_.key(subproblem);
  if (group_number(plan_, batch, group) < plan_.groups_done) return true;
  const Division& division = plan_.division;
  const auto lock = monitor_.lock();
  for (std::int64_t position = 0; position < division.quorum_size(); ++position) {
    const std::int64_t chunk = division.query_chunk_of(quorum, position);
    if (!plan_.merged_chunks.contains(chunk)) continue;
    const QuorumList quorums = uses_.quorums(Side::query, chunk);
    const auto at = std::lower_bound(quorums.begin(), quorums.end(), quorum);
    if (at == quorums.end() || *at != quorum) continue;
    const std::int64_t first = pieces_.number({batch, group, chunk, 0});
    const std::int64_t pieces = piece_count(plan_, division.chunk(chunk).queries);
    for (std::int64_t piece = first; piece < first + pieces; ++piece) {
      if (merged_[static_cast<std::size_t>(piece)] <= at - quorums.begin()) return false;
    }
  }
  return true;
}

bool Assembler::is_complete() const {
  const auto lock = monitor_.lock();
  return pieces_left_ == 0 && (all_durable_ || checkpoint_options_.directory.empty());
}

std::vector<std::int32_t> Assembler::merged_counts() const {
  const auto lock = monitor_.lock();
  return merged_;
}

std::int64_t Assembler::lacking_pieces(const SubproblemKey& subproblem, std::int64_t chunk) const {
  if (group_number(plan_, subproblem.batch, subproblem.group) < plan_.groups_done) return 0;
  const auto lock = monitor_.lock();
  const std::int64_t pieces = piece_count(plan_, plan_.division.chunk(chunk).queries);
  std::int64_t lacking = 0;
  for (std::int64_t piece = 0; piece < pieces; ++piece) {
    lacking += has({subproblem.batch, subproblem.group, chunk, piece}, subproblem.quorum) ? 0 : 1;
  }
  return lacking;
}

bool Assembler::lacks(std::int64_t batch, std::int64_t group, std::int64_t chunk,
                      std::int64_t quorum) const {
  return lacking_pieces({batch, group, quorum}, chunk) > 0;
}

void Assembler::deliver(const Partial& partial) {
  const PieceKey& key = partial.key;
  Turn turn;
  {
    const auto lock = monitor_.lock();
    turn = this->turn(key, plan_.key(partial.subproblem).quorum);
    if (turn != Turn::past) {
      Entry& entry = entries_[key];
      if (turn == Turn::next) begin(key, entry);
      if (turn == Turn::early) {
        entry.early.emplace(partial.subproblem, partial);
        if (merged(key) == 0 && !entry.busy && is_first(partial)) waiting_.insert(key);
      }
    }
  }
  if (turn == Turn::past) give_back(partial.buffer);
  if (turn == Turn::next) ready_.push(partial);
}

// Under the lock: no other partial of its piece comes before it.
bool Assembler::is_first(const Partial& partial) const {
  return plan_.key(partial.subproblem).quorum ==
         uses_.quorums(Side::query, partial.key.chunk).front();
}

// Under the lock.
void Assembler::begin(const PieceKey& key, Entry& entry) {
  entry.busy = true;
  if (begins(key) && admitted_.erase(key) == 0) open_.begin(key);
}

void Assembler::merge_chain(Partial partial) {
  // The same thread goes on with the partials that were waiting for this one: put back into the
  // queue they could stand behind pieces that wait for this piece's accumulator.
  for (;;) {
    auto lock = monitor_.lock();
    const QuorumList quorums = uses_.quorums(Side::query, partial.key.chunk);
    auto position = static_cast<std::size_t>(merged(partial.key));
    lock.unlock();
    merge_one(partial, quorums, position);

    lock.lock();
    count_merged(partial.key, scores_of_heads(partial.key, partial.scores));
    const auto at = entries_.find(partial.key);
    Entry& entry = at->second;
    merged(partial.key) = static_cast<std::int32_t>(++position);
    ++changes_;
    if (on_merged_) on_merged_(partial.subproblem);
    if (position == quorums.size()) {
      entries_.erase(at);
      lock.unlock();
      end_piece(partial.key, position > 1);
      return;
    }
    const auto follower = entry.early.find(subproblem_of(partial.key, quorums[position]));
    if (follower == entry.early.end()) {
      entry.busy = false;
      ++changes_;
      return;
    }
    partial = follower->second;
    entry.early.erase(follower);
  }
}

// A piece is finished: those that waited for its accumulator are begun.
void Assembler::end_piece(const PieceKey& key, bool begun) {
  std::vector<Partial> next;
  {
    const auto lock = monitor_.lock();
    open_.end(key, begun);
    while (!waiting_.empty() && open_.may_begin(*waiting_.begin())) {
      const PieceKey waiting = *waiting_.begin();
      waiting_.erase(waiting_.begin());
      Entry& entry = entries_.at(waiting);
      next.push_back(entry.early.begin()->second);
      entry.early.erase(entry.early.begin());
      begin(waiting, entry);
    }
    ++changes_;
  }
  for (const Partial& partial : next) ready_.push(partial);
}

void Assembler::merge_one(const Partial& partial, const QuorumList& quorums, std::size_t position) {
  const bool last = position + 1 == quorums.size();
  const std::int64_t scores = scores_of_heads(partial.key, partial.scores);
  if (quorums.size() == 1) {  // nothing to merge with: finished where it lies
    finish(partial.key, partial.states, {1, scores});
    give_back(partial.buffer);
    return;
  }
  const auto [states, before] = store_.open(partial.key, partial.subproblem);
  const AccumulatorStore::Progress progress{before.merged + 1, before.scores + scores};
  {
    const std::int64_t bytes = softmax_state_bytes(states.rows, states.dim);
    const StageTimer timer(telemetry_, Stage::merge, bytes, partial.subproblem);
    if (before.merged == 0) {
      std::memcpy(states.acc, partial.states.acc, static_cast<std::size_t>(bytes));
    } else {
      merge(states, partial.states);
    }
  }
  give_back(partial.buffer);
  if (last) {
    finish(partial.key, states, progress);
    store_.remove(partial.key);
  } else {
    store_.close(partial.key, progress, subproblem_of(partial.key, quorums[position + 1]));
  }
}

std::int64_t Assembler::scores_of_heads(const PieceKey& key, std::int64_t scores) const {
  return scores * block_of(plan_, key).heads.size();
}

// Under the lock. `scores` of all heads.
void Assembler::count_merged(const PieceKey& key, std::int64_t scores) {
  merged_scores_[static_cast<std::size_t>(key.chunk)] += static_cast<std::uint64_t>(scores);
}

}  // namespace stream_cqsa
