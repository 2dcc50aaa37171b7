// The system has no more threads.
#define BOOST_TEST_MODULE engine_threads
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>
#include <fstream>
#include <string>

#include "cpu/lanes.hpp"
#include "stream_cqsa/error.hpp"

using namespace stream_cqsa;

namespace {

constexpr std::size_t stack_bytes = std::size_t{1} << 30;

std::size_t mapped_bytes() {
  std::size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

// While it lives, new threads have large stacks and there is address space for `threads` of them.
class RoomForThreads {
 public:
  explicit RoomForThreads(std::size_t threads) {
    ::pthread_attr_init(&attributes_);
    ::pthread_getattr_default_np(&attributes_);
    ::pthread_attr_getstacksize(&attributes_, &usual_);
    set_stack(stack_bytes);
    ::getrlimit(RLIMIT_AS, &limit_);
    // The half is for what else a thread maps.
    rlimit tight = limit_;
    tight.rlim_cur = mapped_bytes() + threads * stack_bytes + stack_bytes / 2;
    ::setrlimit(RLIMIT_AS, &tight);
  }
  ~RoomForThreads() {
    ::setrlimit(RLIMIT_AS, &limit_);
    set_stack(usual_);
    ::pthread_attr_destroy(&attributes_);
  }
  RoomForThreads(const RoomForThreads&) = delete;
  RoomForThreads& operator=(const RoomForThreads&) = delete;

 private:
  void set_stack(std::size_t bytes) {
    ::pthread_attr_setstacksize(&attributes_, bytes);
    ::pthread_setattr_default_np(&attributes_);
  }
  pthread_attr_t attributes_;
  std::size_t usual_ = 0;
  rlimit limit_{};
};

}  // namespace

BOOST_AUTO_TEST_CASE(lanes_whose_threads_do_not_all_start_are_an_error) {
  for (const std::size_t threads : {0, 1, 2}) {
    std::string message;
    {
      const RoomForThreads room(threads);
      try {
        const Lanes lanes;
      } catch (const Error& error) {
        message = error.what();
      }
    }
    BOOST_TEST_CONTEXT("room for " << threads << ": " << message) {
      BOOST_TEST(message.find("threads for copies and launches cannot be started") !=
                 std::string::npos);
    }
  }
  Lanes lanes;
  lanes.wait(lanes.submit(Lane::compute, [] {}, {}));
}
