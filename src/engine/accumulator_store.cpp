#include "engine/accumulator_store.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <string>
#include <system_error>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

std::unique_ptr<File> open_scratch(const std::filesystem::path& directory) {
  // A name of its own: processes of several hosts may share the directory and have equal numbers.
  std::string path = directory / "stream-cqsa-accumulators-XXXXXX";
  const int descriptor = mkstemp(path.data());
  if (descriptor < 0) {
    throw Error(fmt::format("scratch directory {} cannot be written: {}", directory.string(),
                            std::generic_category().message(errno)));
  }
  ::close(descriptor);
  auto file = open_posix_file(path, FileMode::create);
  // Without a name it goes when the process does, however that ends.
  std::filesystem::remove(path);
  return file;
}

}  // namespace

AccumulatorStore::AccumulatorStore(const Plan& plan, std::byte* memory,
                                   const std::filesystem::path& scratch, Telemetry& telemetry,
                                   Abort& abort)
    : plan_(plan),
      memory_(memory),
      slot_bytes_(plan.host.accumulator_bytes),
      telemetry_(telemetry),
      monitor_(abort) {
  for (std::int64_t i = plan.host.accumulators; i-- > 0;) {
    free_slots_.push_back(static_cast<std::int32_t>(i));
  }
  if (plan.placement == AccumulatorPlacement::file) file_ = open_scratch(scratch);
}

AccumulatorStore::Opened AccumulatorStore::open(const PieceKey& key, std::int64_t subproblem) {
  auto lock = monitor_.lock();
  const auto [at, fresh] = entries_.try_emplace(key);
  Entry& entry = at->second;
  monitor_.wait(lock, [&] { return !entry.busy; });
  entry.busy = true;
  if (entry.slot >= 0) {
    idle_.erase({entry.next_merge, key});
  } else {
    const std::int32_t slot = take_slot(lock);
    if (!fresh) {
      entry.next_merge = subproblem;
      move(lock, key, entry, slot, false);
    }
    entry.slot = slot;
  }
  return {softmax_states_at(data_of(entry.slot), piece_rows(plan_, key), plan_.problem().head_dim),
          fresh};
}

void AccumulatorStore::close(const PieceKey& key, std::int64_t next_merge) {
  const auto lock = monitor_.lock();
  Entry& entry = entries_.at(key);
  entry.busy = false;
  entry.next_merge = next_merge;
  idle_.insert({next_merge, key});
  monitor_.notify();
}

void AccumulatorStore::remove(const PieceKey& key) {
  const auto lock = monitor_.lock();
  const auto at = entries_.find(key);
  free_slots_.push_back(at->second.slot);
  if (at->second.file_slot >= 0) free_file_slots_.push_back(at->second.file_slot);
  entries_.erase(at);
  monitor_.notify();
}

std::int32_t AccumulatorStore::take_slot(Monitor::Lock& lock) {
  const bool may_spill = plan_.placement == AccumulatorPlacement::file;
  monitor_.wait(lock, [&] { return !free_slots_.empty() || (may_spill && !idle_.empty()); });
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
  const std::int32_t slot = victim.slot;
  move(lock, key, victim, slot, true);
  victim.slot = -1;
  victim.busy = false;
  monitor_.notify();
  return slot;
}

void AccumulatorStore::move(Monitor::Lock& lock, const PieceKey& key, Entry& entry,
                            std::int32_t slot, bool out) {
  if (entry.file_slot < 0) {
    if (free_file_slots_.empty()) free_file_slots_.push_back(file_slots_++);
    entry.file_slot = free_file_slots_.back();
    free_file_slots_.pop_back();
  }
  const auto offset = static_cast<std::uint64_t>(entry.file_slot * slot_bytes_);
  const std::int64_t bytes = softmax_state_bytes(piece_rows(plan_, key), plan_.problem().head_dim);
  const std::span<std::byte> data(data_of(slot), static_cast<std::size_t>(bytes));
  const std::int64_t subproblem = entry.next_merge;
  lock.unlock();
  {
    const StageTimer timer(telemetry_, Stage::spill, bytes, subproblem);
    if (out) {
      file_->write_at(offset, data);
    } else {
      file_->read_at(offset, data);
    }
  }
  lock.lock();
}

}  // namespace stream_cqsa
