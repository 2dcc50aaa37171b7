// Input rows in host memory: read once while they fit, evicted by farthest next use (Belady 1966).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "engine/monitor.hpp"
#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/telemetry.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// A fixed number of blocks of input rows. One thread requests blocks in the order in which they
/// will be copied to the device; reader threads fill them; another thread takes them, in the same
/// order, and submits the copies.
///
/// A block is reused only when every requested copy from it is complete. That cannot deadlock: the
/// blocks requested first are the ones copied first, so a request that finds none free waits for
/// copies that do not depend on it.
///
/// Requests may run ahead of the copies as far as that costs nothing: into blocks that hold nothing
/// or what is not used again. Others are given up for 16 blocks, or an eighth of all, at most:
/// those that wait for their copies are lost to what would be used again, and is then read again.
class HostCache {
 public:
  HostCache(const Plan& plan, const Inputs& inputs, std::byte* memory, Backend& backend,
            Telemetry& telemetry, Abort& abort);

  /// Finds or starts reading a block of `tensor`. Returns the cache block's number, which stays
  /// pinned until release(). `next_use` is when the schedule wants the block after this.
  std::int32_t request(SlotTensor tensor, const Block& block, std::int64_t subproblem,
                       std::int64_t next_use);

  /// Says that a use of the block has passed that needed no copy, as its rows were in a device
  /// slot: `next_use` is the one after. Does nothing when the block is not in the cache.
  void pass_over(SlotTensor tensor, const Block& block, std::int64_t next_use);

  /// Waits until the block has been read; it lies packed in its source's layout.
  StridedRows wait_read(std::int32_t number);
  /// Whether it has: of a block that is requested and not released.
  bool is_read(std::int32_t number);

  /// The copy from the block has been submitted as `copy`.
  void release(std::int32_t number, Ticket copy);

  /// No more requests: lets the readers end.
  void close() { reads_.close(); }

  /// A reader thread's body.
  void read_blocks();

 private:
  struct Key {
    SlotTensor tensor = SlotTensor::query;
    std::int64_t batch = 0;
    std::int64_t first_head = 0;
    std::int64_t first_token = 0;
    friend auto operator<=>(const Key&, const Key&) = default;
  };
  struct Entry {
    bool read = false;
    Key key;
    Block block;
    std::int64_t pins = 0;      ///< requested copies not yet submitted
    std::int64_t next_use = 0;  ///< subproblem id
    Ticket last_copy;
  };
  struct ReadTask {
    std::int32_t number = 0;
    std::int64_t subproblem = 0;
  };

  using Rank = std::pair<std::int64_t, std::int32_t>;  ///< next use, minus the number

  static Key key_of(SlotTensor tensor, const Block& block) {
    return {tensor, block.batch, block.heads.begin, block.tokens.begin};
  }
  Rank rank_of(std::int32_t number) const {
    return {entries_[static_cast<std::size_t>(number)].next_use, -number};
  }
  /// A block that has never been used, else the idle one whose next use is farthest.
  std::int32_t take_block(Monitor::Lock& lock, std::int64_t subproblem);
  /// Blocks whose next use has passed without it, as subproblems were left out, count as not used
  /// again.
  void forget_passed(std::int64_t subproblem);
  bool may_evict(std::int64_t subproblem);
  std::byte* data_of(std::int32_t number) const { return memory_ + number * block_bytes_; }

  const Inputs& inputs_;
  std::byte* memory_;
  std::int64_t block_bytes_;
  Backend& backend_;
  Telemetry& telemetry_;
  Monitor monitor_;
  std::vector<Entry> entries_;
  std::int32_t used_ = 0;    ///< entries that have ever held a block: those with lower numbers
  std::int32_t pinned_ = 0;  ///< entries with pins
  std::int32_t unread_ = 0;  ///< entries that are still being read, or wait for that
  std::map<Key, std::int32_t> where_;
  std::set<Rank> idle_;  ///< blocks without pins: the last one is the first to go
  BoundedQueue<ReadTask> reads_;
};

}  // namespace stream_cqsa
