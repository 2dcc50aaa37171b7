// The CUDA backend: lanes, one arena on the device, work lists for the kernels.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <numbers>
#include <optional>
#include <vector>

#include "cuda/attention.hpp"
#include "cuda/check.hpp"
#include "cuda/handles.hpp"
#include "cuda/lanes.hpp"
#include "cuda/states.hpp"
#include "cuda/work_lists.hpp"
#include "engine/device_slots.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/cuda_backend.hpp"

namespace stream_cqsa {
namespace {

using namespace cuda;

constexpr std::int64_t arena_alignment = 256;
// The workspace begins with the counts of NaN and infinite values, and the launches' flags.
constexpr std::int64_t counts_bytes = 256;

// A flag in device memory that is set past whatever is under way there.
class CancelFlag {
 public:
  explicit CancelFlag(int* flag) : flag_(flag), one_(sizeof(int)) {
    constexpr int one = 1;
    std::memcpy(one_.data(), &one, sizeof one);
  }
  const int* get() const { return flag_; }
  // By the copy engine: a kernel would wait for those that it is to end. A device that refuses has
  // failed, which is told by whoever waits for its work.
  void set() noexcept {
    static_cast<void>(
        cudaMemcpyAsync(flag_, one_.data(), sizeof(int), cudaMemcpyHostToDevice, stream_.get()));
  }

 private:
  int* flag_;
  PinnedMemory one_;
  Stream stream_;
};

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int device) : device_(device), name_(cuda_devices()[device].name) {
    use_device(device_);
  }

  DeviceTraits traits(const Problem& problem) const override {
    if (const auto obstacle = cuda_obstacle({device_}, problem); !obstacle.empty()) {
      throw InputError(obstacle + "; use --backend cpu");
    }
    use_device(device_);  // whose kernel tiles are asked for
    DeviceTraits traits;
    traits.kind = "cuda";
    traits.name = name_;
    // Chunks end with a query tile. With a tile of keys, which may be another size, they need not.
    traits.tile = attention_tile(storage_type(problem.dtype), problem.head_dim).queries;
    traits.slot_alignment = arena_alignment;
    traits.workspace_bytes = counts_bytes;
    traits.merges = true;
    traits.overlap_worth = 16;  // kernels far outlast copies until subproblems are very small
    traits.overlap_flop = 2'000'000'000'000;  // several milliseconds of kernel
    // Twice: as either kernel counts tiles.
    traits.query_item_bytes = 2 * WorkLists::depth * static_cast<std::int64_t>(sizeof(QueryItem));
    traits.key_item_bytes = WorkLists::depth * static_cast<std::int64_t>(sizeof(KeyItem));
    return traits;
  }

  std::string numerics(const Problem& problem) const override {
    const CudaDevice device = cuda_devices()[static_cast<std::size_t>(device_)];
    use_device(device_);
    return fmt::format("cuda, compute capability {}.{}, {} kernel", device.major, device.minor,
                       attention_kernel(storage_type(problem.dtype), problem.head_dim));
  }

  void prepare(const Plan& plan, Telemetry& telemetry) override {
    problem_ = plan.problem();
    lse_ = plan.request.lse;
    use_device(device_);
    tile_ = attention_tile(storage_type(problem_.dtype), problem_.head_dim);
    portable_tile_ = portable_attention_tile(storage_type(problem_.dtype), problem_.head_dim);
    most_queries_ = most_keys_ = 0;
    for (std::int64_t i = 0; i < plan.division.chunk_count(); ++i) {
      const Chunk chunk = plan.division.chunk(i);
      most_queries_ = std::max(most_queries_, chunk.queries.size());
      most_keys_ = std::max(most_keys_, chunk.keys.size());
    }
    if (std::max(most_queries_, most_keys_) > most_pool_tokens) tile_ = portable_tile_;
    // Those of another plan, before there are others.
    lanes_.reset();
    lists_.reset();
    cancelled_.reset();
    memory_ = {};
    allocate(plan);
    slots_ = {plan.device, memory_.data(), problem_.head_dim};
    lists_.emplace(plan.device.workspace_bytes - counts_bytes, slots_.workspace() + counts_bytes);
    constexpr std::int64_t zero_bytes = std::int64_t{64} << 10;
    zeros_.emplace(zero_bytes);
    std::memset(zeros_->data(), 0, static_cast<std::size_t>(zero_bytes));
    const Stream stream;
    STREAM_CQSA_CUDA_CHECK(cudaMemsetAsync(counts(), 0, counts_bytes, stream.get()));
    cancelled_.emplace(reinterpret_cast<int*>(counts() + 3));
    load_kernels(plan, stream.get());
    STREAM_CQSA_CUDA_CHECK(cudaStreamSynchronize(stream.get()));
    lanes_.emplace(device_, telemetry);
  }

  std::int64_t allocated_bytes() const override { return memory_.bytes(); }
  std::int64_t memory_in_use() const override;

  std::shared_ptr<void> pin(std::span<std::byte> memory) override {
    use_device(device_);
    return std::make_shared<Pinned>(memory);
  }

  Ticket copy_in(const CopyIn& copy, std::span<const Ticket> after) override {
    return lanes_->submit(Lane::copy_in,
                          {"copy in", Stage::copy_in, copy.bytes(vector_bytes()), copy.subproblem,
                           [&](cudaStream_t stream) {
                             for (const SlotRows& rows : copy.rows)
                               enqueue_copy_in(copy, rows, stream);
                           }},
                          after);
  }

  Ticket launch(WorkList work, std::span<const Ticket> after) override;

  Ticket copy_out(const CopyOut& copy, std::span<const Ticket> after) override {
    const std::int64_t bytes = softmax_state_bytes(copy.into.rows, problem_.head_dim);
    return lanes_->submit(Lane::copy_out,
                          {"copy out", Stage::copy_out, bytes, copy.subproblem,
                           [&](cudaStream_t stream) { enqueue_copy_out(copy, stream); }},
                          after);
  }

  Ticket merge(const MergeWork& work, std::span<const Ticket> after) override {
    const std::int64_t bytes = softmax_state_bytes(work.rows, problem_.head_dim);
    return lanes_->submit(Lane::compute,
                          {"merge kernel", Stage::merge, bytes, work.subproblem,
                           [&](cudaStream_t stream) {
                             launch_merge(slots_.states(work.into_slot, work.rows),
                                          slots_.states(work.from_slot, work.rows), stream);
                           }},
                          after);
  }

  Ticket finalise(const FinaliseWork& work, std::span<const Ticket> after) override {
    return lanes_->submit(Lane::compute,
                          {"finalise kernel", Stage::merge, 0, work.subproblem,
                           [&](cudaStream_t stream) { enqueue_finalise(work, stream); }},
                          after);
  }

  Ticket copy_out_rows(const CopyOutRows& copy, std::span<const Ticket> after) override {
    const std::int64_t sums = copy.m ? 2 * static_cast<std::int64_t>(sizeof(float)) : 0;
    return lanes_->submit(
        Lane::copy_out,
        {"copy out of finished rows", Stage::copy_out, copy.rows * (output_row_bytes() + sums),
         copy.subproblem, [&](cudaStream_t stream) { enqueue_copy_out_rows(copy, stream); }},
        after);
  }

  void wait(Ticket ticket) override { lanes_->wait(ticket); }
  void cancel() noexcept override {
    if (!lanes_) return;
    lanes_->cancel();  // first: what sees the flag has failed
    static_cast<void>(cudaSetDevice(device_));
    cancelled_->set();
  }
  void quiesce() noexcept override {
    if (lanes_) lanes_->quiesce();
  }
  std::uint64_t scores_computed() const override { return scores_computed_; }

  NonFinite output_non_finite() override {
    use_device(device_);
    std::array<unsigned long long, 2> counted{};
    STREAM_CQSA_CUDA_CHECK(
        cudaMemcpy(counted.data(), counts(), sizeof counted, cudaMemcpyDeviceToHost));
    return {static_cast<std::int64_t>(counted[0]), static_cast<std::int64_t>(counted[1])};
  }

 private:
  std::int64_t vector_bytes() const {
    return problem_.head_dim * size_of(storage_type(problem_.dtype));
  }
  std::int64_t output_row_bytes() const {
    return problem_.head_dim * size_of(problem_.output_dtype);
  }
  // Of NaN, then of infinite values.
  unsigned long long* counts() const {
    return reinterpret_cast<unsigned long long*>(slots_.workspace());
  }

  void allocate(const Plan& plan);
  void load_kernels(const Plan& plan, cudaStream_t stream);
  void enqueue_copy_in(const CopyIn& copy, const SlotRows& some, cudaStream_t stream) const;
  void clear(std::byte* at, std::int64_t bytes, cudaStream_t stream) const;
  void enqueue_copy_out(const CopyOut& copy, cudaStream_t stream) const;
  void enqueue_copy_out_rows(const CopyOutRows& copy, cudaStream_t stream) const;
  void enqueue_finalise(const FinaliseWork& work, cudaStream_t stream) const;
  std::int64_t add_queries(const std::vector<const QueryWork*>& queries, std::int64_t heads,
                           std::int64_t tile, WorkLists::List& list) const;
  AttentionWork describe(const WorkList& work, WorkLists::List& list) const;

  const int device_;
  const std::string name_;
  Problem problem_;
  AttentionTile tile_{}, portable_tile_{};
  std::int64_t most_queries_ = 0, most_keys_ = 0;  // tokens of the longest chunks
  bool lse_ = false;
  DeviceMemory memory_;
  DeviceSlots slots_;
  std::optional<WorkLists> lists_;
  std::optional<PinnedMemory> zeros_;
  std::optional<CancelFlag> cancelled_;
  std::uint64_t scores_computed_ = 0;
  std::optional<Lanes> lanes_;  // last: it ends before what its work refers to
};

std::int64_t CudaBackend::memory_in_use() const {
  use_device(device_);
  std::size_t free = 0, total = 0;
  STREAM_CQSA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return static_cast<std::int64_t>(total - free);
}

void CudaBackend::allocate(const Plan& plan) {
  try {
    memory_ = DeviceMemory(plan.device.bytes());
  } catch (const CudaError& error) {
    if (error.code() != cudaErrorMemoryAllocation) throw;
    cudaGetLastError();  // or a later launch would take it for its own
    const std::int64_t free = cuda_free_memory(device_);
    throw OutOfDeviceMemory(
        fmt::format("{}: the plan's {} of device memory cannot be allocated, {} are free; give "
                    "--device-memory at most that",
                    name_, format_bytes(plan.device.bytes()), format_bytes(free)),
        free);
  }
}

// A kernel is loaded by its first launch, which then takes long. Here that is one of a single query
// token without keys, through the plan's own launchers: they load what the plan's work will take.
void CudaBackend::load_kernels(const Plan& plan, cudaStream_t stream) {
  WorkLists::List& list = lists_->next();
  AttentionWork attention = describe({0, plan.groups.front(), {{0, 0, {0, 1}, 0, 0}}, {}}, list);
  attention.any_partial = problem_.mask == Mask::causal;
  list.send(stream);
  launch_attention(storage_type(problem_.dtype), attention, stream);
  if (plan.placement != AccumulatorPlacement::device) return;
  const SoftmaxStates states = slots_.states(0, 1);
  launch_merge(states, states, stream);
  launch_finalise(states, 1, problem_.output_dtype, slots_.output(0), counts(), stream);
}

void CudaBackend::enqueue_copy_in(const CopyIn& copy, const SlotRows& some,
                                  cudaStream_t stream) const {
  const std::int64_t vector = vector_bytes();
  const std::int64_t row = copy.heads * vector;
  std::byte* to = slots_.input(copy.tensor, copy.slot) + some.first_token * row;
  const StridedRows& from = some.source;
  const auto rows = [&](std::byte* into, const std::byte* source, std::int64_t bytes) {
    STREAM_CQSA_CUDA_CHECK(cudaMemcpy2DAsync(
        into, static_cast<std::size_t>(row), source, static_cast<std::size_t>(from.token_stride),
        static_cast<std::size_t>(bytes), static_cast<std::size_t>(some.tokens),
        cudaMemcpyHostToDevice, stream));
  };
  const bool whole_rows = from.head_stride == vector || copy.heads == 1;
  if (whole_rows && (from.token_stride == row || some.tokens == 1)) {
    STREAM_CQSA_CUDA_CHECK(cudaMemcpyAsync(to, from.data,
                                           static_cast<std::size_t>(some.tokens * row),
                                           cudaMemcpyHostToDevice, stream));
  } else if (whole_rows) {
    rows(to, from.data, row);
  } else {
    for (std::int64_t head = 0; head < copy.heads; ++head) {
      rows(to + head * vector, from.data + head * from.head_stride, vector);
    }
  }
  const std::int64_t end = some.first_token + some.tokens;
  if (copy.tensor != SlotTensor::value || end != copy.slot_tokens) return;
  // A kernel that copies whole tiles reads on behind the chunk's end: what another chunk left there
  // must not be NaN.
  const std::int64_t tile_end = std::min(round_up(end, tile_.keys), most_keys_);
  clear(to + some.tokens * row, (tile_end - end) * row, stream);
}

// By the copy engine: a memset is a kernel, which would wait until the attention kernel that is
// under way leaves room for it, and the copies behind it with it.
void CudaBackend::clear(std::byte* at, std::int64_t bytes, cudaStream_t stream) const {
  while (bytes > 0) {
    const std::int64_t some = std::min(bytes, zeros_->bytes());
    STREAM_CQSA_CUDA_CHECK(cudaMemcpyAsync(at, zeros_->data(), static_cast<std::size_t>(some),
                                           cudaMemcpyHostToDevice, stream));
    at += some;
    bytes -= some;
  }
}

void CudaBackend::enqueue_copy_out(const CopyOut& copy, cudaStream_t stream) const {
  const SoftmaxStates from = rows_of(slots_.states(copy.state_slot, copy.slot_rows),
                                     {copy.first_row, copy.first_row + copy.into.rows});
  const auto numbers = [&](float* into, const float* source, std::int64_t count) {
    STREAM_CQSA_CUDA_CHECK(cudaMemcpyAsync(into, source,
                                           static_cast<std::size_t>(count) * sizeof(float),
                                           cudaMemcpyDeviceToHost, stream));
  };
  numbers(copy.into.acc, from.acc, from.rows * from.dim);
  numbers(copy.into.m, from.m, from.rows);
  numbers(copy.into.l, from.l, from.rows);
}

void CudaBackend::enqueue_finalise(const FinaliseWork& work, cudaStream_t stream) const {
  const SoftmaxStates states = slots_.states(work.state_slot, work.rows);
  std::byte* to = slots_.output(work.output_slot);
  launch_finalise(states, work.keyless_rows, problem_.output_dtype, to, counts(), stream);
  if (!lse_) return;
  const FinishedLayout layout(problem_, work.rows, lse_);
  const auto bytes = static_cast<std::size_t>(work.rows) * sizeof(float);
  for (const auto& [offset, from] :
       {std::pair(layout.m_offset, states.m), std::pair(layout.l_offset, states.l)}) {
    STREAM_CQSA_CUDA_CHECK(
        cudaMemcpyAsync(to + offset, from, bytes, cudaMemcpyDeviceToDevice, stream));
  }
}

void CudaBackend::enqueue_copy_out_rows(const CopyOutRows& copy, cudaStream_t stream) const {
  const FinishedLayout layout(problem_, copy.slot_rows, lse_);
  const std::byte* slot = slots_.output(copy.output_slot);
  const auto rows = [&](void* into, std::int64_t offset, std::int64_t row_bytes) {
    STREAM_CQSA_CUDA_CHECK(cudaMemcpyAsync(into, slot + offset + copy.first_row * row_bytes,
                                           static_cast<std::size_t>(copy.rows * row_bytes),
                                           cudaMemcpyDeviceToHost, stream));
  };
  rows(copy.output, 0, output_row_bytes());
  if (!copy.m) return;
  rows(copy.m, layout.m_offset, sizeof(float));
  rows(copy.l, layout.l_offset, sizeof(float));
}

Ticket CudaBackend::launch(WorkList work, std::span<const Ticket> after) {
  // For what is asked of the device below. Where it has failed, submitting says so.
  static_cast<void>(cudaSetDevice(device_));
  WorkLists::List& list = lists_->next();
  lanes_->wait(list.last_use);
  const AttentionWork attention = describe(work, list);
  // The list travels ahead of its launch, beside the copies in.
  const Ticket sent =
      lanes_->submit(Lane::copy_in,
                     {"copy in of the work list", Stage::copy_in, list.bytes(), work.subproblem,
                      [&](cudaStream_t stream) { list.send(stream); }},
                     {});
  std::vector<Ticket> all(after.begin(), after.end());
  all.push_back(sent);
  scores_computed_ += scores_in_tiles(problem_, work, tile_);
  list.last_use =
      lanes_->submit(Lane::compute,
                     {"attention kernel", Stage::compute, 0, work.subproblem,
                      [&](cudaStream_t stream) {
                        launch_attention(storage_type(problem_.dtype), attention, stream);
                      }},
                     all);
  return list.last_use;
}

// Adds the query items, counted in tiles of `tile` tokens. Returns the tiles.
std::int64_t CudaBackend::add_queries(const std::vector<const QueryWork*>& queries,
                                      std::int64_t heads, std::int64_t tile,
                                      WorkLists::List& list) const {
  std::int64_t tiles = 0;
  for (const QueryWork* query : queries) {
    const SoftmaxStates states = slots_.states(query->state_slot, query->queries.size() * heads);
    list.add({slots_.query(query->slot), states.acc, states.m, states.l, query->queries.begin,
              query->queries.size(), tiles, query->first_key, query->key_count, query->slot});
    tiles += ceil_div(query->queries.size(), tile);
  }
  return tiles;
}

AttentionWork CudaBackend::describe(const WorkList& work, WorkLists::List& list) const {
  const std::int64_t heads = work.heads.count * problem_.query_heads_per_kv_head();
  const std::vector<const QueryWork*> queries = longest_last(problem_, work);
  AttentionWork attention{};
  list.clear();
  attention.tiles = add_queries(queries, heads, tile_.queries, list);
  attention.portable_tiles = add_queries(queries, heads, portable_tile_.queries, list);
  for (const KeyWork& key : work.keys) {
    list.add({slots_.key(key.slot), slots_.value(key.slot), key.keys.begin, key.keys.size(),
              key.partial ? 1 : 0, key.slot});
    attention.any_partial |= key.partial ? 1 : 0;
  }
  attention.query_count = static_cast<std::int64_t>(queries.size());
  attention.key_count = static_cast<std::int64_t>(work.keys.size());
  attention.queries = list.queries();
  attention.portable_queries = list.queries() + queries.size();
  attention.keys = list.keys();
  attention.heads = heads;
  attention.kv_heads = work.heads.count;
  attention.dim = problem_.head_dim;
  attention.scale_log2 = static_cast<float>(problem_.scale * std::numbers::log2e);
  attention.causal_shift = problem_.causal_shift();
  attention.query_pool = {slots_.query(0), slots_.arena.query_slots, slots_.arena.query_slot_bytes,
                          most_queries_};
  attention.key_pool = {slots_.key(0), slots_.arena.kv_slots, slots_.arena.kv_slot_bytes,
                        most_keys_};
  attention.non_finite = reinterpret_cast<int*>(counts() + 2);
  attention.cancelled = cancelled_->get();
  return attention;
}

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  if (const auto obstacle = cuda_obstacle(options); !obstacle.empty()) {
    throw InputError(obstacle + "; use --backend cpu");
  }
  return std::make_unique<CudaBackend>(options.device);
}

}  // namespace stream_cqsa
