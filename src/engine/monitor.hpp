// How the engine's threads wait for one another, and how one failure ends all waits.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace stream_cqsa {

/// Thrown out of a wait when another thread has failed. Never the cause of a failure.
struct Aborted {};

/// Keeps the first failure of a group of threads and wakes every Monitor that is attached.
class Abort {
 public:
  /// Call from a catch block: keeps the current exception if it is the first.
  void fail() {
    const std::scoped_lock lock(mutex_);
    if (!failure_) {
      failure_ = std::current_exception();
      for (auto& act : acts_) act();
    }
    for (auto& wake : wakers_) wake();
  }
  /// Ends the group early, where nothing need have failed.
  void stop() {
    try {
      throw Aborted{};
    } catch (...) {
      fail();
    }
  }
  bool failed() const {
    const std::scoped_lock lock(mutex_);
    return failure_ != nullptr;
  }
  /// Has `act` called at the first failure, as soon as that is kept. It must not block.
  void on_failure(std::function<void()> act) {
    const std::scoped_lock lock(mutex_);
    acts_.push_back(std::move(act));
  }
  void rethrow_if_failed() const {
    const std::scoped_lock lock(mutex_);
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  friend class Monitor;
  mutable std::mutex mutex_;
  std::exception_ptr failure_;
  std::vector<std::function<void()>> acts_;
  std::list<std::function<void()>> wakers_;
};

/// A mutex and a condition whose waits end with Aborted when the group has failed.
class Monitor {
 public:
  using Lock = std::unique_lock<std::mutex>;

  explicit Monitor(Abort& abort) : abort_(abort) {
    const std::scoped_lock lock(abort_.mutex_);
    waker_ = abort_.wakers_.insert(abort_.wakers_.end(), [this] {
      const Lock own(mutex_);
      aborted_ = true;
      condition_.notify_all();
    });
  }
  ~Monitor() {
    const std::scoped_lock lock(abort_.mutex_);
    abort_.wakers_.erase(waker_);
  }
  Monitor(const Monitor&) = delete;
  Monitor& operator=(const Monitor&) = delete;

  Lock lock() { return Lock(mutex_); }
  template <typename Predicate>
  void wait(Lock& lock, Predicate ready) {
    condition_.wait(lock, [&] { return aborted_ || ready(); });
    if (aborted_) throw Aborted{};
  }
  /// Waits no longer than that; tells whether `ready`.
  template <typename Duration, typename Predicate>
  bool wait_for(Lock& lock, Duration duration, Predicate ready) {
    const bool is_ready = condition_.wait_for(lock, duration, [&] { return aborted_ || ready(); });
    if (aborted_) throw Aborted{};
    return is_ready;
  }
  void notify() { condition_.notify_all(); }

 private:
  Abort& abort_;
  std::list<std::function<void()>>::iterator waker_;
  std::mutex mutex_;
  std::condition_variable condition_;
  bool aborted_ = false;
};

/// A first-in first-out queue between threads, of at most `capacity` elements.
template <typename T>
class BoundedQueue {
 public:
  BoundedQueue(Abort& abort, std::size_t capacity) : monitor_(abort), capacity_(capacity) {}

  void push(T value) {
    auto lock = monitor_.lock();
    monitor_.wait(lock, [&] { return queue_.size() < capacity_; });
    queue_.push_back(std::move(value));
    monitor_.notify();
  }
  /// The next element, or nothing once the queue is closed and empty.
  std::optional<T> pop() {
    auto lock = monitor_.lock();
    monitor_.wait(lock, [&] { return !queue_.empty() || closed_; });
    return front(lock);
  }
  /// The next element, or nothing where there is none yet.
  std::optional<T> try_pop() {
    const auto lock = monitor_.lock();
    return front(lock);
  }
  /// The next element, or nothing where there is none yet or it is not `wanted`, which is asked
  /// under the queue's lock and must not wait.
  template <typename Wanted>
  std::optional<T> try_pop_if(const Wanted& wanted) {
    const auto lock = monitor_.lock();
    if (!queue_.empty() && !wanted(std::as_const(queue_.front()))) return std::nullopt;
    return front(lock);
  }
  void close() {
    const auto lock = monitor_.lock();
    closed_ = true;
    monitor_.notify();
  }

 private:
  std::optional<T> front(const Monitor::Lock&) {
    if (queue_.empty()) return std::nullopt;
    std::optional<T> value(std::move(queue_.front()));
    queue_.pop_front();
    monitor_.notify();
    return value;
  }
  Monitor monitor_;
  std::size_t capacity_;
  std::deque<T> queue_;
  bool closed_ = false;
};

/// A set of interchangeable things, taken and given back by several threads.
template <typename T>
class Pool {
 public:
  Pool(Abort& abort, std::vector<T> items) : monitor_(abort), items_(std::move(items)) {}

  T take() {
    auto lock = monitor_.lock();
    monitor_.wait(lock, [&] { return !items_.empty(); });
    return pop();
  }
  std::optional<T> try_take() {
    const auto lock = monitor_.lock();
    if (items_.empty()) return std::nullopt;
    return pop();
  }
  void give(T item) {
    const auto lock = monitor_.lock();
    items_.push_back(std::move(item));
    monitor_.notify();
  }

 private:
  T pop() {
    T item = std::move(items_.back());
    items_.pop_back();
    return item;
  }
  Monitor monitor_;
  std::vector<T> items_;
};

/// Threads of one group: an exception in any of them aborts the group. Joined on destruction.
class Crew {
 public:
  explicit Crew(Abort& abort) : abort_(abort) {}
  ~Crew() { join(); }
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  template <typename Body>
  void start(Body body) {
    try {
      threads_.emplace_back([this, body = std::move(body)]() mutable {
        try {
          body();
        } catch (...) {
          abort_.fail();
        }
      });
    } catch (...) {
      abort_.fail();  // no thread to be had: those that run must not wait for this one
      throw;
    }
  }
  void join() {
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  Abort& abort_;
  std::vector<std::thread> threads_;
};

}  // namespace stream_cqsa
