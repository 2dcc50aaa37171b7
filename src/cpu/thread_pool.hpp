// Threads that run one function together.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace stream_cqsa {

/// `wanted`, or one for each core that the process may use when `wanted` is 0.
int available_threads(int wanted);

/// `threads` workers, the thread that calls run() among them.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(others_.size()) + 1; }

  /// Calls body(worker) once on every worker, 0 being the caller, and returns when all have ended.
  /// Throws what one of them threw. One call at a time.
  void run(const std::function<void(int)>& body);

 private:
  void stop();
  void serve(int worker);
  void call(const std::function<void(int)>& body, int worker);

  std::mutex mutex_;
  std::condition_variable started_;
  std::condition_variable ended_;
  const std::function<void(int)>* body_ = nullptr;
  std::uint64_t round_ = 0;
  int running_ = 0;
  bool stopping_ = false;
  std::exception_ptr failure_;
  std::vector<std::thread> others_;
};

}  // namespace stream_cqsa
