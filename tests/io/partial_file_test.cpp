// Files that must not outlive a process that a signal ends.
#define BOOST_TEST_MODULE io_partial_file
#include "io/partial_file.hpp"

#include <atomic>
#include <boost/test/unit_test.hpp>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <optional>
#include <thread>

#include "support/durable_run.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

bool blocks(int signal) {
  sigset_t blocked;
  pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
  return sigismember(&blocked, signal) == 1;
}

void create(const std::filesystem::path& path) { std::ofstream(path) << "unfinished"; }

std::atomic<int> signals_seen{0};
extern "C" void count_signal(int) { ++signals_seen; }

}  // namespace

BOOST_AUTO_TEST_CASE(while_a_file_begins_its_thread_gets_no_signals) {
  std::signal(SIGUSR2, count_signal);
  sigset_t usr1;
  sigemptyset(&usr1);
  sigaddset(&usr1, SIGUSR1);
  pthread_sigmask(SIG_BLOCK, &usr1, nullptr);
  {
    const BeginningFile beginning;
    for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2}) BOOST_TEST(blocks(signal));
    std::raise(SIGUSR2);
    BOOST_TEST(signals_seen == 0);
  }
  BOOST_TEST(signals_seen == 1);
  BOOST_TEST(!blocks(SIGTERM));
  BOOST_TEST(blocks(SIGUSR1));  // as before
  pthread_sigmask(SIG_UNBLOCK, &usr1, nullptr);
}

BOOST_AUTO_TEST_CASE(a_handler_waits_for_the_name_of_a_file_that_begins) {
  const TestDirectory directory;
  for (int trial = 0; trial < 50; ++trial) {
    const std::filesystem::path path = directory.path() / "o.npy.partial";
    std::optional<BeginningFile> beginning(std::in_place);
    std::atomic<bool> called{false};
    std::thread handler([&] {
      called = true;
      remove_doomed_files();
    });
    while (!called) std::this_thread::yield();
    create(path);
    const DoomedName doomed(path);
    beginning.reset();
    handler.join();
    BOOST_TEST(!std::filesystem::exists(path));
  }
}

BOOST_AUTO_TEST_CASE(a_handler_does_not_wait_for_ever) {
  const TestDirectory directory;
  const std::filesystem::path path = directory.path() / "o.npy.partial";
  create(path);
  const DoomedName doomed(path);
  const BeginningFile beginning;  // as where the handler has interrupted its thread
  remove_doomed_files();
  BOOST_TEST(!std::filesystem::exists(path));
}

BOOST_AUTO_TEST_CASE(what_is_forgotten_may_stay) {
  const TestDirectory directory;
  const std::filesystem::path kept = directory.path() / "kept", gone = directory.path() / "gone";
  create(kept);
  create(gone);
  {
    DoomedName first(kept);
    const DoomedName second(gone);
    first.forget();
    remove_doomed_files();
  }
  BOOST_TEST(std::filesystem::exists(kept));
  BOOST_TEST(!std::filesystem::exists(gone));
  create(gone);
  { const DoomedName ended(gone); }
  remove_doomed_files();
  BOOST_TEST(std::filesystem::exists(gone));
}
