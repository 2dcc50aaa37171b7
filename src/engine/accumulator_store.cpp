#include "engine/accumulator_store.hpp"

#include "engine/checksum.hpp"
#include "io/direct_file.hpp"

namespace stream_cqsa {
namespace {

std::optional<StateFile> open_file(const Plan& plan, const RunOptions& options) {
  const std::int64_t slot_bytes = plan.host.accumulator_bytes;
  FileOpener open = open_posix_file;
  const bool durable = !options.checkpoint.directory.empty();
  if (options.goes_direct && options.goes_direct(accumulator_file_bytes(plan, durable))) {
    open = direct_block_opener([warn = options.warn](const std::string& line) {
      if (warn) warn(line);
    });
  }
  if (durable) {
    return StateFile::kept(options.checkpoint.directory / "states", slot_bytes, open);
  }
  if (plan.placement != AccumulatorPlacement::file) return std::nullopt;
  return StateFile::scratch(options.scratch, slot_bytes, open);
}

}  // namespace

AccumulatorStore::AccumulatorStore(const Plan& plan, std::byte* memory, const RunOptions& options,
                                   Telemetry& telemetry, Abort& abort)
    : plan_(plan),
      memory_(memory),
      telemetry_(telemetry),
      monitor_(abort),
      file_(open_file(plan, options)) {
  for (std::int64_t i = plan.host.accumulators; i-- > 0;) {
    free_slots_.push_back(static_cast<std::int32_t>(i));
  }
}

AccumulatorStore::Opened AccumulatorStore::open(const PieceKey& key, std::int64_t subproblem) {
  auto lock = monitor_.lock();
  Entry& entry = entries_.try_emplace(key).first->second;
  monitor_.wait(lock, [&] { return !entry.busy; });
  entry.busy = true;
  if (entry.slot >= 0) {
    idle_.erase({entry.next_merge, key});
  } else {
    const std::int32_t slot = take_slot(lock);
    entry.next_merge = subproblem;
    if (entry.progress.merged > 0) read(lock, key, entry, slot);
    entry.slot = slot;
  }
  std::byte* data = data_of(key, entry.slot).data();
  return {softmax_states_at(data, piece_rows(plan_, key), plan_.problem().head_dim),
          entry.progress};
}

void AccumulatorStore::close(const PieceKey& key, const Progress& progress,
                             std::int64_t next_merge) {
  const auto lock = monitor_.lock();
  Entry& entry = entries_.at(key);
  entry.busy = false;
  entry.progress = progress;
  entry.next_merge = next_merge;
  idle_.insert({next_merge, key});
  monitor_.notify();
}

void AccumulatorStore::remove(const PieceKey& key) {
  const auto lock = monitor_.lock();
  const auto at = entries_.find(key);
  free_slots_.push_back(at->second.slot);
  if (at->second.file_slot >= 0) file_->give(at->second.file_slot);
  entries_.erase(at);
  monitor_.notify();
}

std::int32_t AccumulatorStore::take_slot(Monitor::Lock& lock) {
  monitor_.wait(lock, [&] { return !free_slots_.empty() || (file_ && !idle_.empty()); });
  if (!free_slots_.empty()) {
    const std::int32_t slot = free_slots_.back();
    free_slots_.pop_back();
    return slot;
  }
  const auto last = std::prev(idle_.end());
  const PieceKey key = last->second;
  idle_.erase(last);
  Entry& victim = entries_.at(key);
  victim.busy = true;
  write(lock, key, victim);
  const std::int32_t slot = victim.slot;
  victim.slot = -1;
  victim.busy = false;
  monitor_.notify();
  return slot;
}

// The entry is busy. What the file holds of it already is not written again, and never over a
// version that a record names.
void AccumulatorStore::write(Monitor::Lock& lock, const PieceKey& key, Entry& entry) {
  if (entry.file_merged == entry.progress.merged) return;
  if (entry.file_slot >= 0 && file_->is_shared(entry.file_slot)) {
    file_->give(entry.file_slot);
    entry.file_slot = -1;
  }
  if (entry.file_slot < 0) entry.file_slot = file_->take();
  entry.file_merged = -1;
  const std::span<const std::byte> data = data_of(key, entry.slot);
  const std::int64_t merged = entry.progress.merged;
  lock.unlock();
  {
    const StageTimer timer(telemetry_, Stage::spill, static_cast<std::int64_t>(data.size()),
                           entry.next_merge);
    if (file_->is_kept()) entry.file_checksum = checksum(data, data_seed(key, merged));
    file_->write(entry.file_slot, data);
  }
  lock.lock();
  entry.file_merged = merged;
}

void AccumulatorStore::read(Monitor::Lock& lock, const PieceKey& key, Entry& entry,
                            std::int32_t slot) {
  lock.unlock();
  {
    const std::span<std::byte> data = data_of(key, slot);
    const StageTimer timer(telemetry_, Stage::spill, static_cast<std::int64_t>(data.size()),
                           entry.next_merge);
    file_->read(entry.file_slot, data);
  }
  lock.lock();
}

std::span<std::byte> AccumulatorStore::data_of(const PieceKey& key, std::int32_t slot) const {
  const std::int64_t bytes = softmax_state_bytes(piece_rows(plan_, key), plan_.problem().head_dim);
  return {memory_ + slot * plan_.host.accumulator_bytes, static_cast<std::size_t>(bytes)};
}

// --- with a checkpoint ---

void AccumulatorStore::restore(std::span<const JournalRecord> records) {
  std::vector<std::int64_t> slots;
  for (const JournalRecord& record : records) {
    Entry& entry = entries_[record.key];
    entry.progress = {record.merged, record.scores};
    entry.recorded = entry.file_merged = record.merged;
    entry.file_slot = record.slot;
    entry.file_checksum = record.data;
    slots.push_back(record.slot);
  }
  file_->restore(slots, 2);  // the entry and the record
}

std::vector<JournalRecord> AccumulatorStore::record_changes() {
  auto lock = monitor_.lock();
  std::vector<PieceKey> keys;
  for (const auto& [key, entry] : entries_) {
    if (entry.busy || entry.recorded != entry.progress.merged) keys.push_back(key);
  }
  std::vector<JournalRecord> records;
  for (const PieceKey& key : keys) {
    JournalRecord record;
    if (record_change(lock, key, record)) records.push_back(record);
  }
  return records;
}

bool AccumulatorStore::record_change(Monitor::Lock& lock, const PieceKey& key,
                                     JournalRecord& record) {
  auto at = entries_.end();
  monitor_.wait(lock, [&] {
    at = entries_.find(key);
    return at == entries_.end() || !at->second.busy;
  });
  if (at == entries_.end()) return false;
  Entry& entry = at->second;
  if (entry.recorded == entry.progress.merged) return false;
  if (entry.slot >= 0) {
    idle_.erase({entry.next_merge, key});
    entry.busy = true;
    write(lock, key, entry);
    entry.busy = false;
    idle_.insert({entry.next_merge, key});
    monitor_.notify();
  }
  entry.recorded = entry.progress.merged;
  file_->share(entry.file_slot);
  record = {JournalRecord::Kind::state,
            key,
            entry.progress.merged,
            entry.progress.scores,
            entry.file_slot,
            entry.file_checksum,
            0,
            {}};
  return true;
}

void AccumulatorStore::release(std::span<const std::int64_t> slots) {
  const auto lock = monitor_.lock();
  for (const std::int64_t slot : slots) file_->give(slot);
}

}  // namespace stream_cqsa
