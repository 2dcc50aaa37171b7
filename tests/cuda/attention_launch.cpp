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
    place_inputs(case_.q, case_.queries, q_);
    place_inputs(case_.k, case_.keys, k_);
    place_inputs(case_.v, case_.keys, v_);
    for (const Range chunk : case_.queries) {
      const std::int64_t rows = chunk.size() * case_.heads;
      acc_.push_back(image_.place(rows * case_.dim * float_bytes));
      m_.push_back(image_.place(rows * float_bytes));
      l_.push_back(image_.place(rows * float_bytes));
    }
    std::int64_t uses = 0;
    for (const auto& list : case_.uses) uses += static_cast<std::int64_t>(list.size());
    const auto chunks = static_cast<std::int64_t>(case_.queries.size());
    queries_ = image_.place(chunks * static_cast<std::int64_t>(sizeof(cuda::QueryItem)));
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

  void place_inputs(const CaseTensor& tensor, const std::vector<Range>& chunks,
                    std::vector<std::int64_t>& offsets) {
    std::int64_t position = 0;
    for (const Range chunk : chunks) {
      const std::int64_t count = chunk.size() * tensor.heads * tensor.dim;
      offsets.push_back(image_.place(count * size_of(case_.type)));
      store(case_.type, tensor.vector(position, 0), count, image_.at(offsets.back()));
      position += chunk.size();
    }
  }

  template <class T>
  T* device_at(std::int64_t offset) const {
    return reinterpret_cast<T*>(device_.data() + offset);
  }

  cuda::AttentionWork write_work() {
    std::int64_t tiles = 0;
    std::int64_t next_key = 0;
    for (std::size_t p = 0; p < case_.queries.size(); ++p) {
      const Range chunk = case_.queries[p];
      const cuda::QueryItem item{device_at<void>(q_[p]),
                                 device_at<float>(acc_[p]),
                                 device_at<float>(m_[p]),
                                 device_at<float>(l_[p]),
                                 chunk.begin,
                                 chunk.size(),
                                 tiles,
                                 next_key,
                                 static_cast<std::int64_t>(case_.uses[p].size())};
      put(item, queries_, static_cast<std::int64_t>(p));
      for (const KeyUse& use : case_.uses[p]) put(key_item(use), keys_, next_key++);
      tiles += ceil_div(chunk.size(), kernel_.queries);
    }
    return {device_at<cuda::QueryItem>(queries_),
            device_at<cuda::KeyItem>(keys_),
            static_cast<std::int64_t>(case_.queries.size()),
            tiles,
            case_.heads,
            case_.kv_heads,
            case_.dim,
            case_.scale_log2,
            case_.causal_shift};
  }

  cuda::KeyItem key_item(const KeyUse& use) const {
    const auto chunk = static_cast<std::size_t>(use.chunk);
    const Range tokens = case_.keys[chunk];
    return {device_at<void>(k_[chunk]), device_at<void>(v_[chunk]), tokens.begin, tokens.size(),
            use.partial};
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
  std::vector<std::int64_t> q_, k_, v_, acc_, m_, l_;  // offsets, by chunk
  std::int64_t queries_ = 0;
  std::int64_t keys_ = 0;
};

}  // namespace

std::vector<CaseKernel> kernels(DType type, std::int64_t dim) {
  if (type == DType::f32) {
    return {{"the kernel", cuda::attention_fma_tile(dim).queries, cuda::launch_attention_f32}};
  }
  std::vector<CaseKernel> both;
  const auto portable =
      type == DType::f16 ? cuda::launch_attention_f16 : cuda::launch_attention_bf16;
  for (const std::int64_t shared_bytes : {cuda::multiprocessor_shared_bytes(), std::int64_t{0}}) {
    both.push_back({shared_bytes > 0 ? "the kernel" : "the kernel's small tiles",
                    cuda::attention_mma_tile(dim, shared_bytes).queries,
                    [=](const cuda::AttentionWork& work, cudaStream_t stream) {
                      portable(work, stream, shared_bytes);
                    }});
  }
  return both;
}

CaseStates launch(const AttentionCase& attention, const CaseKernel& kernel) {
  return Launch(attention, kernel).run();
}

CaseStates launch(const AttentionCase& attention) {
  return launch(attention, kernels(attention.type, attention.dim).front());
}

}  // namespace stream_cqsa::testing
