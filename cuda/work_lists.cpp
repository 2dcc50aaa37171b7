#include "cuda/work_lists.hpp"

#include <cstring>
#include <stdexcept>

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

}  // namespace stream_cqsa::cuda
