// The kernels' work lists on their way to the device.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/attention.hpp"
#include "cuda/handles.hpp"
#include "stream_cqsa/backend.hpp"

namespace stream_cqsa::cuda {

/// A ring of lists in the arena's workspace, each with pinned memory that it is written in first.
class WorkLists {
 public:
  /// How many launches may be on their way at once.
  static constexpr std::int64_t depth = 4;

  /// One launch's list: query items, then key items.
  class List {
   public:
    List(std::byte* device, std::int64_t bytes);

    void clear();
    /// All query items come before the first key item.
    void add(const QueryItem& item);
    void add(const KeyItem& item);
    std::int64_t bytes() const { return written_; }
    const QueryItem* queries() const { return reinterpret_cast<const QueryItem*>(device_); }
    const KeyItem* keys() const { return reinterpret_cast<const KeyItem*>(device_ + first_key_); }
    void send(cudaStream_t stream) const;

    Ticket last_use{Lane::compute, 0};  ///< the launch that reads it

   private:
    template <class Item>
    void append(const Item& item);

    std::byte* device_;
    PinnedMemory staging_;
    std::int64_t written_ = 0;
    std::int64_t first_key_ = 0;
  };

  /// `device` holds `bytes` in all.
  WorkLists(std::int64_t bytes, std::byte* device);

  /// The list that was used longest ago.
  List& next() { return lists_[static_cast<std::size_t>(number_++ % depth)]; }

 private:
  std::vector<List> lists_;
  std::int64_t number_ = 0;
};

/// The query chunks in ascending order of the keys that a query sees: tiles are computed from the
/// last to the first, and a query chunk's from its end, so that the longest start first.
std::vector<const QueryWork*> longest_last(const Problem& problem, const WorkList& work);

/// Scores that the kernel computes, in whole tiles, over all heads.
std::uint64_t scores_in_tiles(const Problem& problem, const WorkList& work, AttentionTile tile);

}  // namespace stream_cqsa::cuda
