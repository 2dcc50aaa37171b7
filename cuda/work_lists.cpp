#include "cuda/work_lists.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "cuda/check.hpp"

namespace stream_cqsa::cuda {

WorkLists::WorkLists(std::int64_t bytes, std::byte* device) {
  const std::int64_t each = bytes / depth / 8 * 8;
  for (std::int64_t i = 0; i < depth; ++i) lists_.emplace_back(device + i * each, each);
}

WorkLists::List::List(std::byte* device, std::int64_t bytes) : device_(device), staging_(bytes) {}

void WorkLists::List::clear() { written_ = first_key_ = 0; }

template <class Item>
void WorkLists::List::append(const Item& item) {
  const auto size = static_cast<std::int64_t>(sizeof(Item));
  if (written_ + size > staging_.bytes()) {
    throw std::logic_error("a work list is longer than the plan has room for");
  }
  std::memcpy(staging_.data() + written_, &item, sizeof(Item));
  written_ += size;
}

void WorkLists::List::add(const QueryItem& item) {
  append(item);
  first_key_ = written_;
}

void WorkLists::List::add(const KeyItem& item) { append(item); }

void WorkLists::List::send(cudaStream_t stream) const {
  STREAM_CQSA_CUDA_CHECK(cudaMemcpyAsync(device_, staging_.data(),
                                         static_cast<std::size_t>(written_), cudaMemcpyHostToDevice,
                                         stream));
}

std::vector<const QueryWork*> longest_last(const Problem& problem, const WorkList& work) {
  std::vector<std::pair<std::int64_t, const QueryWork*>> order;
  for (const QueryWork& query : work.queries) {
    std::int64_t live = 0;
    for (std::int64_t i = query.first_key; i < query.first_key + query.key_count; ++i) {
      live += problem.live_scores(query.queries, work.keys[static_cast<std::size_t>(i)].keys);
    }
    order.emplace_back(live / query.queries.size(), &query);
  }
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<const QueryWork*> queries;
  for (const auto& [live, query] : order) queries.push_back(query);
  return queries;
}

std::uint64_t scores_in_tiles(const Problem& problem, const WorkList& work, AttentionTile tile) {
  std::int64_t scores = 0;
  for (const QueryWork& query : work.queries) {
    for (std::int64_t i = query.first_key; i < query.first_key + query.key_count; ++i) {
      const KeyWork& key = work.keys[static_cast<std::size_t>(i)];
      if (!key.partial) {
        scores +=
            round_up(query.queries.size(), tile.queries) * round_up(key.keys.size(), tile.keys);
        continue;
      }
      for (std::int64_t at = query.queries.begin; at < query.queries.end; at += tile.queries) {
        const std::int64_t last = at + tile.queries - 1;
        const std::int64_t seen = std::clamp<std::int64_t>(
            problem.visible_keys(last) - key.keys.begin, 0, key.keys.size());
        scores += tile.queries * round_up(seen, tile.keys);
      }
    }
  }
  return static_cast<std::uint64_t>(scores * work.heads.count * problem.query_heads_per_kv_head());
}

}  // namespace stream_cqsa::cuda
