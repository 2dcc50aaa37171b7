#include "engine/host_cache.hpp"

#include <algorithm>
#include <iterator>

#include "engine/use_table.hpp"

namespace stream_cqsa {
namespace {

// Blocks that may wait for their copies when others are given up for more: readers have enough to
// do, and a subproblem's burst is smoothed, while the cache stays one.
constexpr std::int32_t least_ahead = 16;
constexpr std::int32_t share_ahead = 8;
// Blocks that may wait to be read then: two for each of the most readers.
constexpr std::int32_t most_unread = 32;

}  // namespace

HostCache::HostCache(const Plan& plan, const Inputs& inputs, std::byte* memory, Backend& backend,
                     Telemetry& telemetry, Abort& abort)
    : inputs_(inputs),
      memory_(memory),
      block_bytes_(plan.host.cache_block_bytes),
      backend_(backend),
      telemetry_(telemetry),
      monitor_(abort),
      entries_(static_cast<std::size_t>(plan.host.cache_blocks)),
      reads_(abort, entries_.size() + 1) {}

std::int32_t HostCache::request(SlotTensor tensor, const Block& block, std::int64_t subproblem,
                                std::int64_t next_use) {
  const Key key = key_of(tensor, block);
  auto lock = monitor_.lock();
  if (const auto found = where_.find(key); found != where_.end()) {
    idle_.erase(rank_of(found->second));
    Entry& entry = entries_[static_cast<std::size_t>(found->second)];
    if (entry.pins++ == 0) ++pinned_;
    entry.next_use = next_use;
    return found->second;
  }
  const std::int32_t number = take_block(lock, subproblem);
  entries_[static_cast<std::size_t>(number)] = {false, key, block, 1, next_use, {}};
  ++pinned_;
  ++unread_;
  where_[key] = number;
  lock.unlock();
  reads_.push({number, subproblem});
  return number;
}

void HostCache::pass_over(SlotTensor tensor, const Block& block, std::int64_t next_use) {
  const auto lock = monitor_.lock();
  const auto found = where_.find(key_of(tensor, block));
  if (found == where_.end()) return;
  const bool was_idle = idle_.erase(rank_of(found->second)) > 0;
  entries_[static_cast<std::size_t>(found->second)].next_use = next_use;
  if (was_idle) idle_.insert(rank_of(found->second));
}

void HostCache::forget_passed(std::int64_t subproblem) {
  while (idle_.begin()->first < subproblem) {
    const std::int32_t passed = -idle_.begin()->second;
    idle_.erase(idle_.begin());
    entries_[static_cast<std::size_t>(passed)].next_use = never;
    idle_.insert(rank_of(passed));
  }
}

bool HostCache::may_evict(std::int64_t subproblem) {
  if (idle_.empty()) return false;
  forget_passed(subproblem);
  if (idle_.rbegin()->first == never) return true;
  const auto blocks = static_cast<std::int32_t>(entries_.size());
  return pinned_ < std::max(least_ahead, blocks / share_ahead) && unread_ < most_unread;
}

std::int32_t HostCache::take_block(Monitor::Lock& lock, std::int64_t subproblem) {
  if (used_ < static_cast<std::int32_t>(entries_.size())) return used_++;
  monitor_.wait(lock, [&] { return may_evict(subproblem); });
  const auto last = std::prev(idle_.end());
  const std::int32_t victim = -last->second;
  idle_.erase(last);
  const Entry& entry = entries_[static_cast<std::size_t>(victim)];
  where_.erase(entry.key);
  const Ticket copy = entry.last_copy;
  lock.unlock();
  backend_.wait(copy);
  lock.lock();
  return victim;
}

StridedRows HostCache::wait_read(std::int32_t number) {
  auto lock = monitor_.lock();
  const Entry& entry = entries_[static_cast<std::size_t>(number)];
  monitor_.wait(lock, [&] { return entry.read; });
  const TensorDesc& desc = inputs_.of(entry.key.tensor).desc();
  return packed_rows(data_of(number), entry.block, desc.layout,
                     desc.dim * size_of(storage_type(desc.dtype)));
}

bool HostCache::is_read(std::int32_t number) {
  const auto lock = monitor_.lock();
  return entries_[static_cast<std::size_t>(number)].read;
}

void HostCache::release(std::int32_t number, Ticket copy) {
  const auto lock = monitor_.lock();
  Entry& entry = entries_[static_cast<std::size_t>(number)];
  entry.last_copy = copy;
  if (--entry.pins > 0) return;
  --pinned_;
  idle_.insert(rank_of(number));
  monitor_.notify();
}

void HostCache::read_blocks() {
  while (const auto task = reads_.pop()) {
    SlotTensor tensor;
    Block block;
    {
      const auto lock = monitor_.lock();
      const Entry& entry = entries_[static_cast<std::size_t>(task->number)];
      tensor = entry.key.tensor;
      block = entry.block;
    }
    TensorSource& source = inputs_.of(tensor);
    const std::int64_t bytes =
        block.vectors() * source.desc().dim * size_of(storage_type(source.desc().dtype));
    {
      const StageTimer timer(telemetry_, Stage::read, bytes, task->subproblem);
      source.read(block, {data_of(task->number), static_cast<std::size_t>(bytes)});
    }
    const auto lock = monitor_.lock();
    entries_[static_cast<std::size_t>(task->number)].read = true;
    --unread_;
    monitor_.notify();
  }
}

}  // namespace stream_cqsa
