#include "engine/checkpoint.hpp"

#include <fmt/format.h>

#include <set>

#include "engine/checksum.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

// Records beyond those that count before the journal is written anew.
constexpr std::int64_t journal_slack = 1 << 16;

}  // namespace

Block block_of(const Plan& plan, const PieceKey& key) {
  const HeadGroup& group = plan.groups[static_cast<std::size_t>(key.group)];
  return {key.batch, piece_range(plan, key), group.query_heads(plan.problem())};
}

std::int64_t output_bytes(const Plan& plan, const PieceKey& key) {
  return piece_rows(plan, key) * plan.problem().head_dim * size_of(plan.problem().output_dtype);
}

void tell_resumed(const CheckpointOptions& options, const Resumed& resumed) {
  if (options.resumed && (resumed.pieces > 0 || resumed.is_damaged())) options.resumed(resumed);
}

Checkpoint::Checkpoint(const Plan& plan, const Outputs& outputs, const CheckpointOptions& options,
                       StateFile& states, std::byte* memory)
    : plan_(plan),
      outputs_(outputs),
      states_(states),
      pieces_(plan),
      uses_(plan),
      journal_(options.directory / "journal", options.identity) {
  resumed_.dropped_records = journal_.dropped_records();
  resumed_.dropped_bytes = journal_.dropped_bytes();
  resumed_.damaged_header = journal_.damaged_header();
  if (options.same_run && resumed_.is_damaged()) {
    throw Error(
        fmt::format("{}: the journal was damaged while it was in use", options.directory.string()));
  }
  restore(memory, options.same_run);
  for (const auto& [key, record] : durable_) {
    resumed_.scores += static_cast<std::uint64_t>(record.scores);
  }
  resumed_.pieces = static_cast<std::int64_t>(durable_.size());
  const bool compact = journal_.count() != resumed_.pieces;
  journal_.forget();
  if (compact) journal_.replace(all());
}

// --- reading ---

void Checkpoint::restore(std::byte* memory, bool same_run) {
  // Newest first: the first sound one of a piece counts.
  std::set<PieceKey> unsound;
  const auto& records = journal_.records();
  for (auto record = records.rbegin(); record != records.rend(); ++record) {
    if (durable_.contains(record->key)) continue;
    if (same_run || is_sound(*record, memory)) {
      durable_.emplace(record->key, *record);
    } else {
      unsound.insert(record->key);
    }
  }
  resumed_.recomputed = static_cast<std::int64_t>(unsound.size());
}

bool Checkpoint::is_sound(const JournalRecord& record, std::byte* memory) {
  if (!pieces_.has(record.key)) return false;
  const auto all = static_cast<std::int64_t>(uses_.quorums(Side::query, record.key.chunk).size());
  switch (record.kind) {
    case JournalRecord::Kind::state:
      return record.merged > 0 && record.merged < all && has_states(record, memory);
    case JournalRecord::Kind::finished:
      return record.merged == all && has_rows(record, memory);
  }
  return false;
}

bool Checkpoint::has_states(const JournalRecord& record, std::byte* memory) {
  const std::int64_t bytes =
      softmax_state_bytes(piece_rows(plan_, record.key), plan_.problem().head_dim);
  if (!states_.holds(record.slot, bytes)) return false;
  const std::span<std::byte> data(memory + plan_.host.accumulator_offset(),
                                  static_cast<std::size_t>(bytes));
  try {
    states_.read(record.slot, data);
  } catch (const Error&) {
    return false;  // a sector that cannot be read is one more kind of damage
  }
  return checksum(data, data_seed(record.key, record.merged)) == record.data;
}

bool Checkpoint::has_rows(const JournalRecord& record, std::byte* memory) {
  const Block block = block_of(plan_, record.key);
  std::byte* buffer = memory + plan_.host.output_offset();
  const std::span<std::byte> rows(buffer,
                                  static_cast<std::size_t>(output_bytes(plan_, record.key)));
  std::span<std::byte> lse;
  if (outputs_.lse) {
    lse = {reinterpret_cast<std::byte*>(finished_at(plan_, record.key, buffer).m),
           static_cast<std::size_t>(block.vectors()) * sizeof(float)};
  }
  try {
    outputs_.output.read(block, rows);
    if (outputs_.lse) outputs_.lse->read(block, lse);
  } catch (const Error&) {
    return false;
  }
  const std::uint64_t seed = data_seed(record.key, record.merged);
  if (checksum(rows, seed) != record.data) return false;
  if (outputs_.lse && checksum(lse, seed) != record.lse) return false;
  outputs_.output.restore(block, rows);
  if (outputs_.lse) outputs_.lse->restore(block, lse);
  return true;
}

// --- writing ---

std::vector<JournalRecord> Checkpoint::all() const {
  std::vector<JournalRecord> records;
  records.reserve(durable_.size());
  for (const auto& [key, record] : durable_) records.push_back(record);
  return records;
}

std::vector<std::int64_t> Checkpoint::commit(std::vector<JournalRecord> states,
                                             std::span<const JournalRecord> finished) {
  std::set<PieceKey> ended;
  for (const JournalRecord& record : finished) ended.insert(record.key);
  std::vector<std::int64_t> unnamed;
  std::erase_if(states, [&](const JournalRecord& record) {
    const bool obsolete = ended.contains(record.key);
    if (obsolete) unnamed.push_back(record.slot);
    return obsolete;
  });
  if (!finished.empty()) {
    outputs_.output.sync();
    if (outputs_.lse) outputs_.lse->sync();
  }
  if (!states.empty()) states_.sync();

  states.insert(states.end(), finished.begin(), finished.end());
  for (const JournalRecord& record : states) {
    JournalRecord& durable = durable_[record.key];
    if (durable.slot >= 0) unnamed.push_back(durable.slot);
    durable = record;
  }
  const auto live = static_cast<std::int64_t>(durable_.size());
  if (journal_.count() + static_cast<std::int64_t>(states.size()) > 2 * live + journal_slack) {
    journal_.replace(all());
  } else {
    journal_.append(states);
  }
  return unnamed;
}

std::uint64_t Checkpoint::scores() const {
  std::uint64_t scores = 0;
  for (const auto& [key, record] : durable_) scores += static_cast<std::uint64_t>(record.scores);
  return scores;
}

}  // namespace stream_cqsa
