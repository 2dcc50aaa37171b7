// Runs with a checkpoint, from and to memory, that can be stopped and continued.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/files.hpp"
#include "support/attention.hpp"
#include "support/delayed_backend.hpp"

namespace stream_cqsa::testing {

/// A directory of its own, removed at the end.
class TestDirectory {
 public:
  TestDirectory() {
    std::string name = std::filesystem::temp_directory_path() / "stream-cqsa-test-XXXXXX";
    path_ = ::mkdtemp(name.data());
  }
  TestDirectory(const TestDirectory&) = delete;
  TestDirectory& operator=(const TestDirectory&) = delete;
  ~TestDirectory() { std::filesystem::remove_all(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline std::vector<char> read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_file(const std::filesystem::path& path, const std::vector<char>& content) {
  std::ofstream(path, std::ios::binary).write(content.data(), std::ssize(content));
}

/// Asks to stop at a launch, counted from 0, and holds it until the run has stopped.
class HoldingBackend : public DelayedBackend {
 public:
  HoldingBackend(std::unique_ptr<Backend> inner, StopRequest& stop, std::int64_t launch)
      : DelayedBackend(std::move(inner), 1), stop_(stop), left_(launch) {}

  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    if (left_-- == 0) {
      // For the partials before it to be merged.
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      while (!stop_.watched) std::this_thread::yield();
      stop_.stop = true;
      while (stop_.watched) std::this_thread::yield();
    }
    return DelayedBackend::launch(std::move(work), after);
  }

 private:
  StopRequest& stop_;
  std::int64_t left_;
};

/// Counts what it writes, and calls back before each write, from the thread that writes.
class WatchedSink : public TensorSink {
 public:
  WatchedSink(std::unique_ptr<TensorSink> inner, std::function<void(int)> before_write)
      : TensorSink(inner->desc()), inner_(std::move(inner)), before_write_(before_write) {}
  void write(const Block& block, std::span<const std::byte> from) override {
    before_write_(written_++);
    inner_->write(block, from);
    vectors_ += block.vectors();
  }
  void read(const Block& block, std::span<std::byte> into) override { inner_->read(block, into); }
  void restore(const Block& block, std::span<const std::byte>) override {
    vectors_ += block.vectors();
  }
  void commit() override {}
  /// Written or restored.
  std::int64_t vectors() const { return vectors_; }

 private:
  std::unique_ptr<TensorSink> inner_;
  std::function<void(int)> before_write_;
  std::atomic<int> written_ = 0;
  std::atomic<std::int64_t> vectors_ = 0;
};

/// One input and the outputs that several runs write in turn.
class DurableRuns {
 public:
  DurableRuns(const Plan& plan, const TestInput& input) : plan_(plan), input_(input) {
    const Problem& problem = plan.problem();
    output_desc_ = input.query.desc;
    output_desc_.name = "o";
    output_desc_.dtype = problem.output_dtype;
    lse_desc_ = lse_desc(problem.batch, problem.query_heads, problem.query_length);
    output.resize(static_cast<std::size_t>(output_desc_.bytes()));
    if (plan.request.lse) lse.resize(static_cast<std::size_t>(lse_desc_.bytes()));
  }

  /// One run. Throws Stopped, and Error unless every vector was written or restored.
  RunResult run(
      Backend& backend, const RunOptions& options,
      const std::function<void(int)>& before_write = [](int) {}) {
    const auto open = [](const TestTensor& tensor) { return block_source(tensor); };
    const auto query = open(input_.query), key = open(input_.key), value = open(input_.value);
    WatchedSink o(make_memory_sink(output_desc_, output), before_write);
    std::optional<WatchedSink> l;
    if (plan_.request.lse) l.emplace(make_memory_sink(lse_desc_, lse), [](int) {});
    Telemetry telemetry;
    RunResult result = stream_cqsa::run(plan_, {*query, *key, *value}, {o, l ? &*l : nullptr},
                                        backend, options, telemetry);
    const Problem& problem = plan_.problem();
    const std::int64_t vectors = problem.batch * problem.query_length * problem.query_heads;
    if (o.vectors() != vectors || (l && l->vectors() != vectors)) throw Error("rows are missing");
    if (result.merged_scores != expected_scores(plan_)) throw Error("scores are missing");
    return result;
  }

  std::vector<std::byte> output, lse;

 private:
  const Plan& plan_;
  const TestInput& input_;
  TensorDesc output_desc_, lse_desc_;
};

}  // namespace stream_cqsa::testing
