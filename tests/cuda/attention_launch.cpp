// launch() of an AttentionCase: everything lies in one image of device memory.
#include "attention_launch.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

#include "cuda/attention_fma.hpp"
#include "cuda/attention_mma.hpp"
#include "cuda/check.hpp"
#include "cuda/handles.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa::testing {
namespace {

// Memory that is laid out on the host and copied to the device whole. All bytes are 0xff (NaN in
// every type) but those that are put somewhere.
class Image {
 public:
  std::int64_t place(std::int64_t bytes) {
    const std::int64_t offset = round_up(size() + gap, alignment);
    bytes_.resize(static_cast<std::size_t>(offset + bytes + gap), std::byte{0xff});
    return offset;
  }

  std::byte* at(std::int64_t offset) { return bytes_.data() + offset; }
  const std::byte* at(std::int64_t offset) const { return bytes_.data() + offset; }
  std::int64_t size() const { return static_cast<std::int64_t>(bytes_.size()); }

 private:
  static constexpr std::int64_t alignment = 256;
  static constexpr std::int64_t gap = 16384;

  std::vector<std::byte> bytes_;
};

void store(DType type, const float* from, std::int64_t count, std::byte* to) {
  for (std::int64_t i = 0; i < count; ++i, to += size_of(type)) {
    const std::uint16_t small = type == DType::f16 ? f32_to_f16(from[i]) : f32_to_bf16(from[i]);
    if (type == DType::f32) {
      std::memcpy(to, from + i, sizeof(float));
    } else {
      std::memcpy(to, &small, sizeof small);
    }
  }
}

class Launch {
 public:
  Launch(const AttentionCase& attention, const CaseKernel& kernel)
      : case_(attention), kernel_(kernel) {
    if (kernel_.pools) {
      place_pools();
    } else {
      q_ = place_chunks(case_.q, case_.queries);
      k_ = place_chunks(case_.k, case_.keys);
      v_ = place_chunks(case_.v, case_.keys);
    }
    fill(case_.q, case_.queries, q_);
    fill(case_.k, case_.keys, k_);
    fill(case_.v, case_.keys, v_);
    for (const Range chunk : case_.queries) {
      const std::int64_t rows = chunk.size() * case_.heads;
      acc_.push_back(image_.place(rows * case_.dim * float_bytes));
      m_.push_back(image_.place(rows * float_bytes));
      l_.push_back(image_.place(rows * float_bytes));
    }
    std::int64_t uses = 0;
    for (const auto& list : case_.uses) uses += static_cast<std::int64_t>(list.size());
    const auto chunks = static_cast<std::int64_t>(case_.queries.size());
    // Twice: as either kernel counts tiles.
    queries_ = image_.place(2 * chunks * static_cast<std::int64_t>(sizeof(cuda::QueryItem)));
    keys_ = image_.place(uses * static_cast<std::int64_t>(sizeof(cuda::KeyItem)));
    device_ = cuda::DeviceMemory(image_.size());
  }

  CaseStates run() {
    const cuda::AttentionWork work = write_work();
    const auto bytes = static_cast<std::size_t>(image_.size());
    const cuda::Stream stream;
    STREAM_CQSA_CUDA_CHECK(cudaMemcpy(device_.data(), image_.at(0), bytes, cudaMemcpyHostToDevice));
    // It may still be on its way, and our streams do not wait for the default one.
    STREAM_CQSA_CUDA_CHECK(cudaDeviceSynchronize());
    kernel_.launch(work, stream.get());
    STREAM_CQSA_CUDA_CHECK(cudaStreamSynchronize(stream.get()));
    Image after = image_;
    STREAM_CQSA_CUDA_CHECK(cudaMemcpy(after.at(0), device_.data(), bytes, cudaMemcpyDeviceToHost));
    CaseStates states = take_states(after);
    if (std::memcmp(after.at(0), image_.at(0), bytes) != 0) {
      throw Error(kernel_.name + " wrote outside of the states");
    }
    return states;
  }

 private:
  static constexpr auto float_bytes = static_cast<std::int64_t>(sizeof(float));

  using Offsets = std::vector<std::int64_t>;  // by chunk

  std::int64_t bytes_of(const CaseTensor& tensor, std::int64_t tokens) const {
    return tokens * tensor.heads * tensor.dim * size_of(case_.type);
  }

  Offsets place_chunks(const CaseTensor& tensor, const std::vector<Range>& chunks) {
    Offsets offsets;
    for (const Range chunk : chunks)
      offsets.push_back(image_.place(bytes_of(tensor, chunk.size())));
    return offsets;
  }

  // Q in one pool of slots, K and V, half a slot each, in another.
  void place_pools() {
    q_ = place_slots(case_.q, case_.queries, 1, query_pool_);
    k_ = v_ = place_slots(case_.k, case_.keys, 2, key_pool_);
    const std::int64_t tile = cuda::attention_tile(case_.type, case_.dim).keys;
    for (std::size_t i = 0; i < v_.size(); ++i) {
      v_[i] += key_pool_.slot_bytes / 2;
      // What the kernel is promised to be finite.
      const std::int64_t end = std::min(round_up(case_.keys[i].size(), tile), key_pool_.tokens);
      std::memset(image_.at(v_[i]), 0, static_cast<std::size_t>(bytes_of(case_.v, end)));
    }
  }

  Offsets place_slots(const CaseTensor& tensor, const std::vector<Range>& chunks,
                      std::int64_t tensors, cuda::SlotPool& pool) {
    for (const Range chunk : chunks) pool.tokens = std::max(pool.tokens, chunk.size());
    pool.slots = static_cast<std::int64_t>(chunks.size());
    pool.slot_bytes = tensors * round_up(bytes_of(tensor, pool.tokens), 256);
    Offsets offsets = {image_.place(pool.slots * pool.slot_bytes)};
    while (offsets.size() < chunks.size()) offsets.push_back(offsets.back() + pool.slot_bytes);
    return offsets;
  }

  void fill(const CaseTensor& tensor, const std::vector<Range>& chunks, const Offsets& offsets) {
    std::int64_t position = 0;
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      const std::int64_t count = chunks[i].size() * tensor.heads * tensor.dim;
      store(case_.type, tensor.vector(position, 0), count, image_.at(offsets[i]));
      position += chunks[i].size();
    }
  }

  template <class T>
  T* device_at(std::int64_t offset) const {
    return reinterpret_cast<T*>(device_.data() + offset);
  }

  cuda::AttentionWork write_work() {
    const auto chunks = static_cast<std::int64_t>(case_.queries.size());
    cuda::AttentionWork work{device_at<cuda::QueryItem>(queries_),
                             device_at<cuda::KeyItem>(keys_),
                             chunks,
                             write_queries(0, kernel_.queries),
                             case_.heads,
                             case_.kv_heads,
                             case_.dim,
                             case_.scale_log2,
                             case_.causal_shift};
    for (const auto& list : case_.uses) {
      for (const KeyUse& use : list) {
        put(key_item(use), keys_, work.key_count++);
        work.any_partial |= use.partial ? 1 : 0;
      }
    }
    if (!kernel_.pools) return work;
    work.query_pool = query_pool_;
    work.query_pool.base = device_at<void>(q_.front());
    work.key_pool = key_pool_;
    work.key_pool.base = device_at<void>(k_.front());
    work.portable_queries = work.queries + chunks;
    work.portable_tiles =
        write_queries(chunks, cuda::portable_attention_tile(case_.type, case_.dim).queries);
    work.non_finite = reinterpret_cast<int*>(flag_.data());
    return work;
  }

  // The query items, from the list's `first` on, counted in tiles of `tile` tokens. Returns the
  // tiles.
  std::int64_t write_queries(std::int64_t first, std::int64_t tile) {
    std::int64_t tiles = 0;
    std::int64_t next_key = 0;
    for (std::size_t p = 0; p < case_.queries.size(); ++p) {
      const Range chunk = case_.queries[p];
      const auto number = static_cast<std::int64_t>(p);
      const auto uses = static_cast<std::int64_t>(case_.uses[p].size());
      const cuda::QueryItem item{device_at<void>(q_[p]),
                                 device_at<float>(acc_[p]),
                                 device_at<float>(m_[p]),
                                 device_at<float>(l_[p]),
                                 chunk.begin,
                                 chunk.size(),
                                 tiles,
                                 next_key,
                                 uses,
                                 number};
      put(item, queries_, first + number);
      next_key += uses;
      tiles += ceil_div(chunk.size(), tile);
    }
    return tiles;
  }

  cuda::KeyItem key_item(const KeyUse& use) const {
    const auto chunk = static_cast<std::size_t>(use.chunk);
    const Range tokens = case_.keys[chunk];
    return {device_at<void>(k_[chunk]),
            device_at<void>(v_[chunk]),
            tokens.begin,
            tokens.size(),
            use.partial,
            use.chunk};
  }

  template <class T>
  void put(const T& item, std::int64_t list, std::int64_t index) {
    std::memcpy(image_.at(list + index * static_cast<std::int64_t>(sizeof(T))), &item, sizeof item);
  }

  // The states out of `after`, which then holds what was there before.
  CaseStates take_states(Image& after) const {
    CaseStates states;
    for (std::size_t p = 0; p < case_.queries.size(); ++p) {
      const std::int64_t rows = case_.queries[p].size() * case_.heads;
      take(after, acc_[p], rows * case_.dim, states.acc);
      take(after, m_[p], rows, states.m);
      take(after, l_[p], rows, states.l);
    }
    return states;
  }

  void take(Image& after, std::int64_t offset, std::int64_t count, std::vector<float>& to) const {
    const auto bytes = static_cast<std::size_t>(count * float_bytes);
    const std::size_t old = to.size();
    to.resize(old + static_cast<std::size_t>(count));
    std::memcpy(to.data() + old, after.at(offset), bytes);
    std::memcpy(after.at(offset), image_.at(offset), bytes);
  }

  const AttentionCase& case_;
  const CaseKernel& kernel_;
  Image image_;
  cuda::DeviceMemory device_;
  cuda::DeviceMemory flag_{256};  // AttentionWork::non_finite
  cuda::SlotPool query_pool_, key_pool_;
  Offsets q_, k_, v_, acc_, m_, l_;
  std::int64_t queries_ = 0;
  std::int64_t keys_ = 0;
};

}  // namespace

std::vector<CaseKernel> kernels(DType type, std::int64_t dim) {
  if (type == DType::f32) {
    return {{"the kernel", cuda::attention_fma_tile(dim).queries, cuda::launch_attention_f32}};
  }
  std::vector<CaseKernel> all;
  const auto portable =
      type == DType::f16 ? cuda::launch_attention_f16 : cuda::launch_attention_bf16;
  for (const std::int64_t shared_bytes : {cuda::multiprocessor_shared_bytes(), std::int64_t{0}}) {
    all.push_back({shared_bytes > 0 ? "the kernel" : "the kernel's small tiles",
                   cuda::attention_mma_tile(dim, shared_bytes).queries,
                   [=](const cuda::AttentionWork& work, cudaStream_t stream) {
                     portable(work, stream, shared_bytes);
                   }});
  }
  all.push_back({"the kernel for slots in pools", cuda::attention_tile(type, dim).queries,
                 [=](const cuda::AttentionWork& work, cudaStream_t stream) {
                   cuda::launch_attention(type, work, stream);
                 },
                 true});
  return all;
}

CaseStates launch(const AttentionCase& attention, const CaseKernel& kernel) {
  return Launch(attention, kernel).run();
}

}  // namespace stream_cqsa::testing
