#include "app/bench_host.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <future>
#include <memory>
#include <random>
#include <span>
#include <stop_token>
#include <system_error>
#include <thread>
#include <vector>

#include "app/audit.hpp"
#include "mpi/file.hpp"
#include "stream_cqsa/files.hpp"
#include "stream_cqsa/softmax_state.hpp"
#include "stream_cqsa/synthetic.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

double shortest(const std::function<void()>& body) {
  double best = HUGE_VAL;
  constexpr int repetitions = 5;
  for (int i = 0; i < repetitions; ++i) {
    const double begin = now_seconds();
    body();
    best = std::min(best, now_seconds() - begin);
  }
  return best;
}

void on_threads(int threads, const std::function<void(int)>& body) {
  std::vector<std::future<void>> crew;  // waits when it is destroyed, too
  for (int i = 0; i < threads; ++i) crew.push_back(std::async(std::launch::async, body, i));
  for (auto& thread : crew) thread.get();
}

namespace {

constexpr std::int64_t heads = 8, dim = 64, row_bytes = heads * dim * 2;

struct Streams {
  std::vector<std::vector<std::byte>> from, into;
  Streams(int threads, std::int64_t bytes) : from(threads), into(threads) {
    for (auto* side : {&from, &into}) {
      for (auto& buffer : *side)
        buffer.assign(static_cast<std::size_t>(bytes / threads), std::byte{1});
    }
  }
};

// Partials of dimension `head_dim`, some for each thread.
class Merges {
 public:
  Merges(int threads, std::int64_t head_dim)
      : rows_(bench_bytes / threads / softmax_state_bytes(1, head_dim)),
        streams_(threads, bench_bytes) {
    const auto states = [&](std::vector<std::byte>& buffer) {
      SoftmaxStates view = softmax_states_at(buffer.data(), rows_, head_dim);
      std::fill_n(view.acc, rows_ * (head_dim + 2), 1.0f);
      return view;
    };
    for (auto& buffer : streams_.from) from_.push_back(states(buffer));
    for (auto& buffer : streams_.into) into_.push_back(states(buffer));
  }

  std::int64_t rows() const { return rows_; }  ///< of each thread
  void merge_all(int thread) {
    merge(into_[static_cast<std::size_t>(thread)], from_[static_cast<std::size_t>(thread)]);
  }

 private:
  const std::int64_t rows_;
  Streams streams_;
  std::vector<SoftmaxStates> from_, into_;
};

// Threads that merge for as long as this lives.
class MergingBeside {
 public:
  explicit MergingBeside(int threads) : merges_(threads, dim) {
    for (int i = 0; i < threads; ++i) {
      crew_.emplace_back([this, i](const std::stop_token& stop) {
        while (!stop.stop_requested()) merges_.merge_all(i);
      });
    }
  }

  MergingBeside(const MergingBeside&) = delete;
  MergingBeside& operator=(const MergingBeside&) = delete;

 private:
  Merges merges_;
  std::vector<std::jthread> crew_;
};

// Calls visit(block) on `threads` for every run of `tokens` tokens of a tensor of one batch entry.
template <typename Visit>
void for_each_block(const TensorDesc& desc, std::int64_t tokens, int threads, const Visit& visit) {
  on_threads(threads, [&](int thread) {
    for (std::int64_t at = thread * tokens; at < desc.tokens; at += threads * tokens) {
      visit(Block{0, {at, std::min(at + tokens, desc.tokens)}, {0, desc.heads}});
    }
  });
}

TensorDesc desc_of(std::int64_t bytes) {
  return {"q", DType::f16, Layout::bshd, 3, 1, bytes / row_bytes, heads, dim};
}

// Seconds in which all of a source is read, as a run does.
double seconds_to_read(TensorSource& source, int threads) {
  constexpr std::int64_t tokens = (std::int64_t{4} << 20) / row_bytes;
  Telemetry telemetry;
  AuditedSource audited(source, telemetry);
  const double begin = now_seconds();
  for_each_block(source.desc(), tokens, threads, [&](const Block& block) {
    thread_local std::vector<std::byte> into;
    into.resize(static_cast<std::size_t>(block.tokens.size() * row_bytes));
    audited.read(block, into);
  });
  return now_seconds() - begin;
}

}  // namespace

double copy_rate(int threads) {
  Streams streams(threads, bench_bytes);
  const double seconds = shortest([&] {
    on_threads(threads, [&](int i) {
      const auto at = static_cast<std::size_t>(i);
      std::memcpy(streams.into[at].data(), streams.from[at].data(), streams.from[at].size());
    });
  });
  return static_cast<double>(bench_bytes) / seconds;
}

double merge_rate(int threads, std::int64_t dim) {
  Merges merges(threads, dim);
  const double seconds =
      shortest([&] { on_threads(threads, [&](int i) { merges.merge_all(i); }); });
  return static_cast<double>(merges.rows() * threads * softmax_state_bytes(1, dim)) / seconds;
}

double generate_rate(int threads) {
  const TensorDesc desc = desc_of(threads * bench_bytes / 2);
  const auto source = make_synthetic_source(desc, 1, 0);
  seconds_to_read(*source, threads);
  return static_cast<double>(desc.bytes()) / seconds_to_read(*source, threads);
}

namespace {

// Rates of writing; leaves the file.
void measure_writes(const std::filesystem::path& path, const TensorDesc& desc,
                    const RunOptions& threads, FileRates& rates) {
  // About 1 MiB; as pieces of chunks do, blocks end within the tiles in which rows are put in
  // order.
  constexpr std::int64_t tokens = 1000;
  const MergingBeside merging(std::max(1, threads.merge_threads / 2));
  const auto rate = [&](const std::function<void(const Block&, std::span<std::byte>)>& visit) {
    const double begin = now_seconds();
    for_each_block(desc, tokens, threads.write_threads, [&](const Block& block) {
      thread_local std::vector<std::byte> rows;
      rows.resize(static_cast<std::size_t>(block.tokens.size() * row_bytes), std::byte{1});
      visit(block, rows);
    });
    return static_cast<double>(desc.bytes()) / (now_seconds() - begin);
  };
  const auto written = [&](bool staged) {
    return create_tensor(path, "", desc, false, open_mpi_file, false, staged);
  };
  Telemetry telemetry;
  {
    const auto staged = written(true);
    AuditedSink audited(*staged, {}, telemetry);
    for (std::int64_t head = 0; head < heads; ++head) {
      rates.rewrite = rate([&](const Block& block, std::span<std::byte> rows) {
        audited.write({0, block.tokens, {head, head + 1}}, rows.first(rows.size() / heads));
      });
    }
  }
  const auto sink = written(false);
  AuditedSink audited(*sink, {}, telemetry);
  rates.write =
      rate([&](const Block& block, std::span<std::byte> rows) { audited.write(block, rows); });
  sink->commit();
}

}  // namespace

FileRates file_rates(const std::filesystem::path& directory, const RunOptions& threads) {
  // Nobody else's.
  const std::filesystem::path path =
      directory / fmt::format("stream-cqsa-bench-{}-{}.npy", getpid(), std::random_device{}());
  const TensorDesc desc = desc_of(4 * bench_bytes);
  FileRates rates;
  measure_writes(path, desc, threads, rates);
  const auto remove = std::shared_ptr<void>(nullptr, [&](void*) {
    std::error_code ignored;
    std::filesystem::remove(path, ignored);
  });
  const auto source = open_tensor(path, "", Layout::bshd, open_mpi_file);
  rates.read = static_cast<double>(desc.bytes()) / seconds_to_read(*source, threads.read_threads);
  bool refused = false;
  const auto direct =
      open_tensor(path, "", Layout::bshd,
                  direct_opener(open_mpi_file, [&](const std::string&) { refused = true; }));
  const double seconds = seconds_to_read(*direct, threads.read_threads);
  if (!refused) rates.read_direct = static_cast<double>(desc.bytes()) / seconds;
  return rates;
}

}  // namespace stream_cqsa
