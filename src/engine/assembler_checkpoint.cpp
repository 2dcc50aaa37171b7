// How the assembler goes on from a checkpoint, and keeps one.
#include <numeric>
#include <utility>

#include "engine/assembler.hpp"
#include "engine/checksum.hpp"
#include "engine/watch.hpp"

namespace stream_cqsa {

void Assembler::resume() {
  const StageTimer timer(telemetry_, Stage::checkpoint, 0, -1);
  checkpoint_.emplace(plan_, outputs_, checkpoint_options_, store_.file(), memory_);
  finished_before_.assign(merged_.size(), false);
  const bool counts = !checkpoint_options_.same_run;
  restored_scores_.assign(static_cast<std::size_t>(group_total(plan_)), 0);
  std::vector<JournalRecord> states;
  for (const auto& [key, record] : checkpoint_->durable()) {
    merged(key) = static_cast<std::int32_t>(record.merged);
    if (counts) count_merged(key, record.scores);
    restored_scores_[static_cast<std::size_t>(group_number(plan_, key.batch, key.group))] +=
        static_cast<std::uint64_t>(record.scores);
    if (record.kind == JournalRecord::Kind::state) {
      states.push_back(record);
      continue;
    }
    finished_before_[static_cast<std::size_t>(pieces_.number(key))] = true;
    if (counts) non_finite_ += record.non_finite;
  }
  pieces_left_ -= finished_from(plan_.groups_done);
  store_.restore(states);
  checkpoint_totals_.resumed = checkpoint_->resumed();
  if (counts) telemetry_.add_restored_scores(checkpoint_totals_.resumed.scores);
}

std::int64_t Assembler::finished_from(std::int64_t group) const {
  std::int64_t finished = 0;
  for (std::size_t i = 0; i < finished_before_.size(); ++i) {
    if (!finished_before_[i]) continue;
    const PieceKey key = pieces_.key(static_cast<std::int64_t>(i));
    const bool has_partials = plan_.problem().sees_keys(plan_.division.chunk(key.chunk).queries);
    // Those without are left to the first plan of a run, see finish_keyless().
    finished += has_partials ? group_number(plan_, key.batch, key.group) >= group : group == 0;
  }
  return finished;
}

double Assembler::lacking_from(std::int64_t group) const {
  if (restored_scores_.empty()) return 1;
  const Problem& problem = plan_.problem();
  std::uint64_t row_scores = 0;
  const Range chunks = plan_.merged_chunks;
  for (std::int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range queries = plan_.division.chunk(chunk).queries;
    row_scores += static_cast<std::uint64_t>(problem.live_scores(queries, {0, problem.key_length}));
  }
  double all = 0, restored = 0;
  for (std::int64_t i = group; i < group_total(plan_); ++i) {
    const auto of_batch = static_cast<std::size_t>(i) % plan_.groups.size();
    all += static_cast<double>(row_scores) *
           static_cast<double>(plan_.groups[of_batch].query_heads(problem).size());
    restored += static_cast<double>(restored_scores_[static_cast<std::size_t>(i)]);
  }
  return all > 0 ? 1 - restored / all : 1;
}

void Assembler::keep_checkpoint() {
  Watch watch(checkpoint_options_.stop, checkpoint_options_.same_run);
  double due = now_seconds() + checkpoint_options_.interval;
  for (;;) {
    bool last = false;  // beside other ranks this one may have to wait long before it ends
    {
      auto lock = monitor_.lock();
      if (monitor_.wait_for(lock, watch_period, [&] { return all_written_; })) break;
      last = pieces_left_ == 0 && !all_durable_;
    }
    const bool stop = watch.stop();
    if (!watch.asked() && !stop && !last && now_seconds() < due) continue;
    checkpoint();
    due = now_seconds() + checkpoint_options_.interval;
    if (last) {
      const auto lock = monitor_.lock();
      all_durable_ = true;
    }
    if (stop) {
      const std::scoped_lock lock(checkpoint_mutex_);
      const auto expected = expected_scores(plan_);
      const std::uint64_t all = std::accumulate(expected.begin(), expected.end(), std::uint64_t{0});
      throw Stopped(all > 0 ? static_cast<double>(checkpoint_->scores()) / static_cast<double>(all)
                            : 1.0);
    }
  }
  checkpoint();
}

void Assembler::checkpoint() {
  if (!checkpoint_) return;
  const std::scoped_lock one_at_a_time(checkpoint_mutex_);
  const double begin = now_seconds();
  const StageTimer timer(telemetry_, Stage::checkpoint, 0, -1);
  std::vector<JournalRecord> states = store_.record_changes();
  std::vector<JournalRecord> finished;
  {
    const auto lock = monitor_.lock();
    finished = std::exchange(written_, {});
  }
  if (states.empty() && finished.empty()) return;
  checkpoint_totals_.records += static_cast<std::int64_t>(states.size() + finished.size());
  for (const JournalRecord& record : states) {
    checkpoint_totals_.bytes +=
        softmax_state_bytes(piece_rows(plan_, record.key), plan_.problem().head_dim);
  }
  const std::int64_t journal_before = checkpoint_->journal_bytes();
  store_.release(checkpoint_->commit(std::move(states), finished));
  ++checkpoint_totals_.written;
  checkpoint_totals_.bytes += checkpoint_->journal_bytes() - journal_before;
  checkpoint_totals_.seconds += now_seconds() - begin;
}

JournalRecord Assembler::record_of(const Finished& finished) const {
  const PieceKey& key = finished.key;
  const std::int64_t merged = finished.merged;
  const std::uint64_t seed = data_seed(key, merged);
  const std::span<const std::byte> rows(output_at(finished.buffer),
                                        static_cast<std::size_t>(output_bytes(plan_, key)));
  JournalRecord record{JournalRecord::Kind::finished,
                       key,
                       merged,
                       finished.scores,
                       -1,
                       checksum(rows, seed),
                       0,
                       finished.non_finite};
  if (outputs_.lse) {
    const std::span<const float> lse(lse_at(finished.buffer, key),
                                     static_cast<std::size_t>(piece_rows(plan_, key)));
    record.lse = checksum(std::as_bytes(lse), seed);
  }
  return record;
}

}  // namespace stream_cqsa
