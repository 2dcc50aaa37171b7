// The quorums that use a chunk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>

namespace stream_cqsa {

/// Quorums in ascending order: a list that is kept elsewhere, or `count` of them, every `step`-th
/// from `first` on.
class QuorumList {
 public:
  explicit QuorumList(std::span<const std::int32_t> list)
      : list_(list.data()), count_(static_cast<std::ptrdiff_t>(list.size())) {}
  QuorumList(std::int64_t first, std::int64_t step, std::int64_t count)
      : first_(first), step_(step), count_(count) {}

  class Iterator;
  using const_iterator = Iterator;
  Iterator begin() const;
  Iterator end() const;

  std::size_t size() const { return static_cast<std::size_t>(count_); }
  std::int64_t operator[](std::size_t index) const {
    return list_ ? list_[index] : first_ + static_cast<std::int64_t>(index) * step_;
  }
  std::int64_t front() const { return (*this)[0]; }

 private:
  const std::int32_t* list_ = nullptr;
  std::int64_t first_ = 0, step_ = 0;
  std::ptrdiff_t count_ = 0;
};

/// For the standard algorithms. Outlives its list.
class QuorumList::Iterator {
 public:
  using iterator_category = std::random_access_iterator_tag;
  using value_type = std::int64_t;
  using difference_type = std::ptrdiff_t;
  using pointer = const std::int64_t*;
  using reference = std::int64_t;

  Iterator(const QuorumList& list, difference_type at) : list_(list), at_(at) {}

  reference operator*() const { return list_[static_cast<std::size_t>(at_)]; }
  Iterator& operator+=(difference_type by) {
    at_ += by;
    return *this;
  }
  Iterator& operator-=(difference_type by) { return *this += -by; }
  Iterator& operator++() { return *this += 1; }
  Iterator& operator--() { return *this += -1; }
  Iterator operator++(int) {
    const Iterator before = *this;
    ++*this;
    return before;
  }
  friend Iterator operator+(Iterator from, difference_type by) { return from += by; }
  friend difference_type operator-(const Iterator& one, const Iterator& other) {
    return one.at_ - other.at_;
  }
  friend bool operator==(const Iterator& one, const Iterator& other) {
    return one.at_ == other.at_;
  }

 private:
  QuorumList list_;
  difference_type at_ = 0;
};

inline QuorumList::Iterator QuorumList::begin() const { return {*this, 0}; }
inline QuorumList::Iterator QuorumList::end() const { return {*this, count_}; }

}  // namespace stream_cqsa
