// The scratch file of the accumulators fails, or cannot be made.
#define BOOST_TEST_MODULE engine_spill
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <boost/test/unit_test.hpp>
#include <filesystem>
#include <fstream>
#include <functional>
#include <optional>
#include <random>

#include "stream_cqsa/error.hpp"
#include "support/delayed_backend.hpp"
#include "support/run_plan.hpp"
#include "support/test_backend.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace fs = std::filesystem;

namespace {

// Runs something once, before the first launch.
class HookedBackend : public DelayedBackend {
 public:
  HookedBackend(std::unique_ptr<Backend> inner, std::function<void()> hook)
      : DelayedBackend(std::move(inner), 1), hook_(std::move(hook)) {}
  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    if (hook_) std::exchange(hook_, nullptr)();
    launched_ = true;
    return DelayedBackend::launch(std::move(work), after);
  }
  bool launched() const { return launched_; }

 private:
  std::function<void()> hook_;
  std::atomic<bool> launched_{false};
};

// A file descriptor of this process that has the scratch file open; -1 for none.
int scratch_descriptor() {
  for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const fs::path target = fs::read_symlink(entry.path(), gone);
    if (target.filename().string().starts_with("stream-cqsa-accumulators-")) {
      return std::stoi(entry.path().filename());
    }
  }
  return -1;
}

// Puts another file in the scratch file's place, opened with `flags`.
void replace_scratch(const fs::path& path, int flags) {
  const int scratch = scratch_descriptor();
  const int other = ::open(path.c_str(), flags | O_CLOEXEC, 0600);
  if (scratch < 0 || other < 0 || ::dup2(other, scratch) < 0) {
    throw std::logic_error("the scratch file could not be replaced");
  }
  ::close(other);
}

struct Fixture {
  Fixture() {
    Problem problem;
    problem.query_heads = problem.kv_heads = 2;
    problem.query_length = problem.key_length = 130;
    problem.head_dim = 8;
    problem.scale = default_scale(8);
    std::mt19937_64 random(4);
    input = random_input(problem, Layout::bshd, 1.0, random);
    PlanRequest request = roomy_request(problem, Layout::bshd, *make_test_backend(2));
    request.device.tile = 1;
    request.chunks = 13;
    request.heads_per_group = 1;
    plan.emplace(with_accumulators_in_a_file(make_plan(request)));
    directory = fs::temp_directory_path() / ("engine-spill-" + std::to_string(::getpid()));
    fs::create_directory(directory);
  }
  ~Fixture() { fs::remove_all(directory); }

  std::string failure_with(std::function<void()> hook) {
    HookedBackend backend(make_test_backend(2), std::move(hook));
    try {
      run_plan(*plan, input, backend, false, directory);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  TestInput input;
  std::optional<Plan> plan;
  fs::path directory;
};

}  // namespace

BOOST_FIXTURE_TEST_CASE(the_scratch_file_has_no_name_and_leaves_nothing, Fixture) {
  BOOST_TEST(failure_with([&] {
               BOOST_TEST(scratch_descriptor() >= 0);
               BOOST_TEST(fs::is_empty(directory));
             }) == "");
  BOOST_TEST(fs::is_empty(directory));
  BOOST_TEST(scratch_descriptor() < 0);
}

BOOST_FIXTURE_TEST_CASE(past_the_page_cache_states_are_the_same, Fixture) {
  const auto [query, key, value] =
      std::tuple(block_source(input.query), block_source(input.key), block_source(input.value));
  const auto run = [&](bool direct) {
    Telemetry telemetry;
    RunOptions options;
    options.scratch = directory;
    options.goes_direct = [&](std::int64_t) { return direct; };
    Outcome outcome =
        run_with(*plan, {*query, *key, *value}, *make_test_backend(2), options, telemetry);
    BOOST_TEST(telemetry.totals()[static_cast<std::size_t>(Stage::spill)].bytes > 0);
    return outcome;
  };
  const Outcome usual = run(false), direct = run(true);
  BOOST_TEST((direct.output == usual.output));
  BOOST_TEST((direct.lse == usual.lse));
  BOOST_TEST(direct.result.scratch_bytes > 0);
  BOOST_TEST(direct.result.scratch_bytes % state_slot_alignment == 0);
}

BOOST_FIXTURE_TEST_CASE(a_full_disk_ends_the_run_with_its_own_error, Fixture) {
  const std::string message = failure_with([] { replace_scratch("/dev/full", O_RDWR); });
  BOOST_TEST_CONTEXT(message) {
    BOOST_TEST(message.starts_with(directory.string() + "/stream-cqsa-accumulators-"));
    BOOST_TEST(message.find("cannot be written at byte") != std::string::npos);
    BOOST_TEST(message.ends_with("No space left on device"));
  }
}

BOOST_FIXTURE_TEST_CASE(a_failing_read_of_the_scratch_file_ends_the_run_with_its_own_error,
                        Fixture) {
  const fs::path other = directory / "write-only";
  const std::string message =
      failure_with([&] { replace_scratch(other, O_WRONLY | O_CREAT | O_TRUNC); });
  BOOST_TEST_CONTEXT(message) {
    BOOST_TEST(message.starts_with(directory.string() + "/stream-cqsa-accumulators-"));
    BOOST_TEST(message.find("cannot be read at byte") != std::string::npos);
  }
  BOOST_TEST(fs::file_size(other) > 0u);
}

BOOST_FIXTURE_TEST_CASE(a_scratch_directory_that_cannot_be_written_is_found_before_the_work,
                        Fixture) {
  const fs::path file = directory / "file";
  std::ofstream(file) << "no directory";
  const fs::path closed = directory / "closed";
  fs::create_directory(closed);
  fs::permissions(closed, fs::perms::owner_read | fs::perms::owner_exec);
  // Permissions do not hold the superuser back, a file system without files of its own does.
  const fs::path unwritable = ::geteuid() == 0 ? fs::path("/proc/self") : closed;
  for (const fs::path& scratch : {directory / "vanished", file, unwritable}) {
    HookedBackend backend(make_test_backend(2), [] {});
    BOOST_CHECK_EXCEPTION(run_plan(*plan, input, backend, false, scratch), Error,
                          [&](const Error& error) {
                            const std::string message = error.what();
                            return message.starts_with("scratch directory " + scratch.string() +
                                                       " cannot be written: ");
                          });
    BOOST_TEST(!backend.launched());
  }
}
