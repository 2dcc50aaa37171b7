// The CPU backend: lanes, an arena in host memory, and the kernel spread over a pool of threads.
#include "stream_cqsa/backend.hpp"

#include <cblas.h>
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <string_view>
#include <thread>

#include "core/counted.hpp"
#include "cpu/attention_kernel.hpp"
#include "cpu/lanes.hpp"
#include "cpu/row_ops.hpp"
#include "cpu/thread_pool.hpp"
#include "engine/buffer.hpp"
#include "engine/device_slots.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr std::int64_t arena_alignment = 64;
// Fewer bytes of states are merged by one thread sooner than others are woken.
constexpr std::int64_t shared_merge_bytes = 256 << 10;

HostBuffer allocate_arena(std::int64_t bytes) {
  try {
    return HostBuffer(bytes);
  } catch (const Error&) {
    throw Error(fmt::format(
        "CPU backend: a device arena of {} cannot be allocated; give a smaller --device-memory",
        format_bytes(bytes)));
  }
}

std::string processor_name() {
  std::ifstream info("/proc/cpuinfo");
  constexpr std::string_view field = "model name";
  for (std::string line; std::getline(info, line);) {
    const auto colon = line.find(": ");
    if (line.starts_with(field) && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "CPU";
}

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const CpuOptions& options) : pool_(available_threads(options.threads)) {
    // Our own threads call the matrix products; OpenBLAS must not start more below them.
    openblas_set_num_threads(1);
  }

  DeviceTraits traits(const Problem& problem) const override {
    DeviceTraits traits;
    traits.kind = "cpu";
    traits.name = processor_name() + ", " + counted(pool_.threads(), "thread");
    traits.tile = KernelShape::mask_keys;
    traits.slot_alignment = arena_alignment;
    traits.workspace_bytes = pool_.threads() * KernelScratch::bytes(problem);
    traits.threads = pool_.threads();
    traits.merges = true;
    return traits;
  }

  std::string numerics(const Problem&) const override {
    return fmt::format("cpu, {}, OpenBLAS {}", row_ops::target_name(), openblas_get_corename());
  }

  void prepare(const Plan& plan, Telemetry& telemetry) override {
    problem_ = plan.problem();
    lse_ = plan.request.lse;
    non_finite_ = {};
    cancelled_ = false;
    lanes_.forget_failures();
    telemetry_ = &telemetry;
    const std::int64_t needed = KernelScratch::bytes(problem_);
    // A plan made for fewer threads runs on those, one made for more on all there are.
    workers_ = static_cast<int>(
        std::min<std::int64_t>(pool_.threads(), plan.device.workspace_bytes / needed));
    if (workers_ < 1) {
      throw Error(fmt::format(
          "CPU backend: the plan has {} bytes of workspace and a thread needs {}; plan again",
          plan.device.workspace_bytes, needed));
    }
    arena_ = {};  // before there is another
    arena_ = allocate_arena(plan.device.bytes());
    slots_ = {plan.device, arena_.data(), problem_.head_dim};
  }

  std::int64_t allocated_bytes() const override { return arena_.bytes(); }

  Ticket copy_in(const CopyIn& copy, std::span<const Ticket> after) override {
    return submit(Lane::copy_in, "copy in", copy.subproblem, after,
                  [this, copy = copy] { run_copy_in(copy); });
  }

  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    const std::int64_t subproblem = work.subproblem;
    return submit(Lane::compute, "compute", subproblem, after,
                  [this, list = std::move(work)] { run_work(list); });
  }

  Ticket copy_out(const CopyOut& copy, std::span<const Ticket> after) override {
    return submit(Lane::copy_out, "copy out", copy.subproblem, after,
                  [this, copy] { run_copy_out(copy); });
  }

  Ticket merge(const MergeWork& work, std::span<const Ticket> after) override {
    return submit(Lane::compute, "merge", work.subproblem, after,
                  [this, work] { run_merge(work); });
  }

  Ticket finalise(const FinaliseWork& work, std::span<const Ticket> after) override {
    return submit(Lane::compute, "finalise", work.subproblem, after,
                  [this, work] { run_finalise(work); });
  }

  Ticket copy_out_rows(const CopyOutRows& copy, std::span<const Ticket> after) override {
    return submit(Lane::copy_out, "copy out of finished rows", copy.subproblem, after,
                  [this, copy] { run_copy_out_rows(copy); });
  }

  void wait(Ticket ticket) override { lanes_.wait(ticket); }
  void cancel() noexcept override { cancelled_ = true; }
  void quiesce() noexcept override { lanes_.quiesce(); }
  std::uint64_t scores_computed() const override { return scores_computed_; }
  NonFinite output_non_finite() override { return non_finite_; }

 private:
  template <class Work>
  Ticket submit(Lane lane, std::string_view call, std::int64_t subproblem,
                std::span<const Ticket> after, Work work) {
    return lanes_.submit(
        lane,
        [this, call, subproblem, work = std::move(work)] {
          try {
            throw_if_cancelled();
            work();
          } catch (const std::exception& error) {
            throw Error(
                fmt::format("subproblem {}: {} on the CPU: {}", subproblem, call, error.what()));
          }
        },
        after);
  }

  void throw_if_cancelled() const {
    if (cancelled_) throw Error("cancelled");
  }

  void run_copy_in(const CopyIn& copy) const;
  void copy_rows_in(const CopyIn& copy, const SlotRows& rows) const;
  std::int64_t vector_bytes() const {
    return problem_.head_dim * size_of(storage_type(problem_.dtype));
  }
  void run_copy_out(const CopyOut& copy) const;
  void run_copy_out_rows(const CopyOutRows& copy) const;
  void run_merge(const MergeWork& work);
  void run_finalise(const FinaliseWork& work);
  void run_work(const WorkList& work);
  std::vector<KernelKeys> keys_of(const WorkList& work) const;
  std::vector<KernelTile> tiles_of(const WorkList& work, const std::vector<KernelKeys>& keys) const;
  void append_tiles(const KernelTile& chunk, std::vector<KernelTile>& tiles) const;

  Problem problem_;
  bool lse_ = false;
  Telemetry* telemetry_ = nullptr;
  HostBuffer arena_;
  DeviceSlots slots_;
  NonFinite non_finite_;  ///< the compute lane's own while it works
  std::atomic<bool> cancelled_{false};
  int workers_ = 0;  ///< threads that the plan has workspace for
  std::atomic<std::uint64_t> scores_computed_{0};
  ThreadPool pool_;
  Lanes lanes_;  // last: destroyed first, while what its work uses is still there
};

void CpuBackend::run_copy_in(const CopyIn& copy) const {
  const StageTimer timer(*telemetry_, Stage::copy_in, copy.bytes(vector_bytes()), copy.subproblem);
  for (const SlotRows& rows : copy.rows) copy_rows_in(copy, rows);
}

void CpuBackend::copy_rows_in(const CopyIn& copy, const SlotRows& rows) const {
  const std::int64_t vector = vector_bytes();
  const std::int64_t row = copy.heads * vector;
  std::byte* to = slots_.input(copy.tensor, copy.slot) + rows.first_token * row;
  const StridedRows& from = rows.source;
  // Runs of bytes that are contiguous on both sides are copied at once.
  const bool whole_rows = from.head_stride == vector || copy.heads == 1;
  const bool whole_block = whole_rows && from.token_stride == row;
  const std::int64_t tokens = whole_block ? 1 : rows.tokens;
  const std::int64_t heads = whole_rows ? 1 : copy.heads;
  const std::int64_t run_bytes = whole_block ? rows.tokens * row : whole_rows ? row : vector;
  const auto run = static_cast<std::size_t>(run_bytes);
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (std::int64_t head = 0; head < heads; ++head, to += run) {
      std::memcpy(to, from.data + token * from.token_stride + head * from.head_stride, run);
    }
  }
}

void CpuBackend::run_copy_out(const CopyOut& copy) const {
  const std::int64_t dim = problem_.head_dim;
  const std::int64_t rows = copy.into.rows;
  const StageTimer timer(*telemetry_, Stage::copy_out, softmax_state_bytes(rows, dim),
                         copy.subproblem);
  const SoftmaxStates from = rows_of(slots_.states(copy.state_slot, copy.slot_rows),
                                     {copy.first_row, copy.first_row + rows});
  std::copy_n(from.acc, rows * dim, copy.into.acc);
  std::copy_n(from.m, rows, copy.into.m);
  std::copy_n(from.l, rows, copy.into.l);
}

void CpuBackend::run_copy_out_rows(const CopyOutRows& copy) const {
  const FinishedLayout layout(problem_, copy.slot_rows, lse_);
  const std::int64_t row = problem_.head_dim * size_of(problem_.output_dtype);
  const std::int64_t sums = copy.m ? 2 * static_cast<std::int64_t>(sizeof(float)) : 0;
  const StageTimer timer(*telemetry_, Stage::copy_out, copy.rows * (row + sums), copy.subproblem);
  const std::byte* slot = slots_.output(copy.output_slot);
  std::memcpy(copy.output, slot + copy.first_row * row, static_cast<std::size_t>(copy.rows * row));
  if (!copy.m) return;
  const auto numbers = [&](std::int64_t offset) {
    return reinterpret_cast<const float*>(slot + offset) + copy.first_row;
  };
  std::copy_n(numbers(layout.m_offset), copy.rows, copy.m);
  std::copy_n(numbers(layout.l_offset), copy.rows, copy.l);
}

// The rows of a state slot that one of `workers` takes.
Range share(std::int64_t rows, int worker, int workers) {
  return {rows * worker / workers, rows * (worker + 1) / workers};
}

void CpuBackend::run_merge(const MergeWork& work) {
  const std::int64_t bytes = softmax_state_bytes(work.rows, problem_.head_dim);
  const StageTimer timer(*telemetry_, Stage::merge, bytes, work.subproblem);
  const SoftmaxStates into = slots_.states(work.into_slot, work.rows);
  const SoftmaxStates from = slots_.states(work.from_slot, work.rows);
  if (bytes < shared_merge_bytes) return stream_cqsa::merge(into, from);
  pool_.run([&](int worker) {
    const Range rows = share(work.rows, worker, pool_.threads());
    stream_cqsa::merge(rows_of(into, rows), rows_of(from, rows));
  });
}

void CpuBackend::run_finalise(const FinaliseWork& work) {
  const StageTimer timer(*telemetry_, Stage::merge, 0, work.subproblem);
  const SoftmaxStates states = slots_.states(work.state_slot, work.rows);
  const FinishedLayout layout(problem_, work.rows, lse_);
  const std::int64_t row = problem_.head_dim * size_of(problem_.output_dtype);
  std::byte* to = slots_.output(work.output_slot);
  std::vector<NonFinite> counts(static_cast<std::size_t>(pool_.threads()));
  pool_.run([&](int worker) {
    const Range rows = share(work.rows, worker, pool_.threads());
    const std::int64_t keyless = std::max<std::int64_t>(work.keyless_rows - rows.begin, 0);
    counts[static_cast<std::size_t>(worker)] = stream_cqsa::finalise(
        rows_of(states, rows), 1, keyless, problem_.output_dtype, to + rows.begin * row, nullptr);
  });
  for (const NonFinite& count : counts) non_finite_ += count;
  if (!lse_) return;
  std::copy_n(states.m, work.rows, reinterpret_cast<float*>(to + layout.m_offset));
  std::copy_n(states.l, work.rows, reinterpret_cast<float*>(to + layout.l_offset));
}

std::vector<KernelKeys> CpuBackend::keys_of(const WorkList& work) const {
  std::vector<KernelKeys> keys;
  keys.reserve(work.keys.size());
  for (const KeyWork& key : work.keys) {
    keys.push_back({slots_.key(key.slot), slots_.value(key.slot), key.keys, key.partial});
  }
  return keys;
}

// Cuts a query chunk, given as one tile of one key/value head, into tiles.
void CpuBackend::append_tiles(const KernelTile& chunk, std::vector<KernelTile>& tiles) const {
  const KernelShape shape(problem_);
  const std::int64_t end_head = chunk.first_head + chunk.heads;
  for (std::int64_t begin = chunk.queries.begin; begin < chunk.queries.end;) {
    const std::int64_t end = begin / shape.tokens * shape.tokens + shape.tokens;
    KernelTile tile = chunk;
    tile.tokens = {begin, std::min(end, chunk.queries.end)};
    for (std::int64_t head = chunk.first_head; head < end_head; head += shape.heads) {
      tile.first_head = head;
      tile.heads = std::min(shape.heads, end_head - head);
      tiles.push_back(tile);
    }
    begin = tile.tokens.end;
  }
}

std::vector<KernelTile> CpuBackend::tiles_of(const WorkList& work,
                                             const std::vector<KernelKeys>& keys) const {
  const std::int64_t ratio = problem_.query_heads_per_kv_head();
  std::vector<KernelTile> tiles;
  for (const QueryWork& query : work.queries) {
    KernelTile chunk{};
    chunk.group_heads = work.heads.count * ratio;
    chunk.group_kv_heads = work.heads.count;
    chunk.query = slots_.query(query.slot);
    chunk.queries = query.queries;
    chunk.states = slots_.states(query.state_slot, query.queries.size() * chunk.group_heads);
    chunk.first_key = keys.begin() + query.first_key;
    chunk.last_key = chunk.first_key + query.key_count;
    for (chunk.kv_head = 0; chunk.kv_head < work.heads.count; ++chunk.kv_head) {
      chunk.first_head = chunk.kv_head * ratio;
      chunk.heads = ratio;
      append_tiles(chunk, tiles);
    }
  }
  return tiles;
}

void CpuBackend::run_work(const WorkList& work) {
  const StageTimer timer(*telemetry_, Stage::compute, 0, work.subproblem);
  const std::vector<KernelKeys> keys = keys_of(work);
  const std::vector<KernelTile> tiles = tiles_of(work, keys);
  // Longest first: what is left for the last thread to end is short.
  std::vector<std::pair<std::int64_t, std::size_t>> order;
  order.reserve(tiles.size());
  for (const KernelTile& tile : tiles)
    order.emplace_back(-score_count(problem_, tile), order.size());
  std::sort(order.begin(), order.end());

  std::atomic<std::size_t> next{0};
  pool_.run([&](int worker) {
    if (worker >= workers_) return;
    const KernelScratch scratch(slots_.workspace() + worker * KernelScratch::bytes(problem_),
                                problem_);
    while (true) {
      const std::size_t at = next++;
      if (at >= order.size() || cancelled_) return;
      compute_tile(problem_, tiles[order[at].second], scratch, &cancelled_);
      scores_computed_ += static_cast<std::uint64_t>(-order[at].first);
    }
  });
  throw_if_cancelled();
}

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options) {
  return std::make_unique<CpuBackend>(options);
}

}  // namespace stream_cqsa
