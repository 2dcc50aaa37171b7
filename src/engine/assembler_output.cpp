// How the assembler finishes rows and writes them.
#include <fmt/format.h>

#include <stdexcept>

#include "engine/assembler.hpp"

namespace stream_cqsa {

std::byte* Assembler::output_at(std::int32_t buffer) const {
  return memory_ + plan_.host.output_offset() + buffer * plan_.host.output_buffer_bytes;
}

float* Assembler::lse_at(std::int32_t buffer, const PieceKey& key) const {
  return finished_at(plan_, key, output_at(buffer)).m;
}

bool Assembler::has_finished(const PieceKey& key) const {
  const auto lock = monitor_.lock();
  return merged_[static_cast<std::size_t>(pieces_.number(key))] == partials_of(key);
}

// Under the lock.
std::int32_t Assembler::partials_of(const PieceKey& key) const {
  return static_cast<std::int32_t>(uses_.quorums(Side::query, key.chunk).size());
}

void Assembler::deliver_finished(const FinishedRows& rows) {
  {
    const auto lock = monitor_.lock();
    if (merged(rows.key) == partials_of(rows.key)) return give_back_output(rows.buffer);
    merged(rows.key) = partials_of(rows.key);
    count_merged(rows.key, scores_of_heads(rows.key, rows.scores));
    if (on_merged_) on_merged_(group_number(plan_, rows.key.batch, rows.key.group));
  }
  finished_.push({rows.key, rows.buffer, 0, 0, {}, true});
}

void Assembler::finish(const PieceKey& key, const SoftmaxStates& states,
                       const AccumulatorStore::Progress& progress) {
  const std::int32_t buffer = output_buffers_.take();
  const Block block = block_of(plan_, key);
  const std::int64_t keyless = keyless_tokens(plan_.problem(), block.tokens);
  NonFinite non_finite;
  {
    const StageTimer timer(telemetry_, Stage::merge, 0, -1);
    non_finite = finalise(states, block.heads.size(), keyless, plan_.problem().output_dtype,
                          output_at(buffer), lse_at(buffer, key));
  }
  {
    const auto lock = monitor_.lock();
    non_finite_ += non_finite;
  }
  finished_.push({key, buffer, progress.merged, progress.scores, non_finite, false});
}

void Assembler::finish_keyless() {
  // Chunks whose last row sees no key have no partial at all: O = 0, lse = -infinity.
  if (plan_.groups_done > 0) return;
  const Problem& problem = plan_.problem();
  const Range chunks = plan_.merged_chunks;
  for (std::int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range queries = plan_.division.chunk(chunk).queries;
    if (queries.empty() || problem.sees_keys(queries)) continue;
    for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
      for (std::size_t group = 0; group < plan_.groups.size(); ++group) {
        for (std::int64_t piece = 0; piece < piece_count(plan_, queries); ++piece) {
          const PieceKey key{batch, static_cast<std::int64_t>(group), chunk, piece};
          if (was_finished(key)) continue;
          finish(key, {nullptr, nullptr, nullptr, piece_rows(plan_, key), problem.head_dim}, {});
        }
      }
    }
  }
}

void Assembler::write_pieces() {
  while (const auto finished = finished_.pop()) {
    write_piece(*finished);
    std::optional<JournalRecord> record;
    if (checkpoint_) record = record_of(*finished);
    give_back_output(finished->buffer);
    const auto lock = monitor_.lock();
    if (record) written_.push_back(*record);
    --pieces_left_;
  }
  const auto lock = monitor_.lock();
  if (--writers_ > 0) return;
  if (pieces_left_ != 0) {
    throw std::logic_error(fmt::format("{} output pieces never became complete", pieces_left_));
  }
  all_written_ = true;
  monitor_.notify();
}

void Assembler::write_piece(const Finished& finished) {
  const Block block = block_of(plan_, finished.key);
  if (outputs_.lse && finished.lacks_lse) {
    const StageTimer timer(telemetry_, Stage::merge, 0, -1);
    const FinishedStates states = finished_at(plan_, finished.key, output_at(finished.buffer));
    const std::int64_t keyless = keyless_tokens(plan_.problem(), block.tokens);
    log_sum_exp(states.m, states.l, block.vectors(), keyless * block.heads.size(), states.m);
  }
  const auto bytes = static_cast<std::size_t>(output_bytes(plan_, finished.key));
  const StageTimer timer(telemetry_, Stage::write, static_cast<std::int64_t>(bytes), -1);
  outputs_.output.write(block, {output_at(finished.buffer), bytes});
  if (outputs_.lse) {
    const std::span<const float> lse(lse_at(finished.buffer, finished.key),
                                     static_cast<std::size_t>(block.vectors()));
    outputs_.lse->write(block, std::as_bytes(lse));
  }
}

void Assembler::end_producer() {
  const auto lock = monitor_.lock();
  if (--producers_ == 0) finished_.close();
}

}  // namespace stream_cqsa
