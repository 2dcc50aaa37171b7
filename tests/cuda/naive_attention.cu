#include <cmath>
#include <cstdint>

#include "cuda/check.hpp"
#include "cuda/handles.hpp"
#include "naive_attention.hpp"

namespace stream_cqsa::testing {
namespace {

constexpr int columns = 32;  // of acc that a thread computes

struct NaiveWork {
  const float* q;  // [token][head][dim]
  const float* k;  // [key][kv head][dim]
  const float* v;
  double* output;      // [row][dim], row = token * heads + head
  double* spread;      // [row][dim]
  double* lse;         // [row]
  double* score_size;  // [row]
  double* value_size;  // [row][dim / columns]
  std::int64_t rows, keys, heads, kv_heads, dim, shift;
  double scale;
  bool causal;
};

struct Score {
  double value;
  double size;
};

__device__ Score score_of(const NaiveWork& work, const float* q, const float* k) {
  Score score{0, 0};
  for (std::int64_t i = 0; i < work.dim; ++i) {
    const double product = static_cast<double>(q[i]) * static_cast<double>(k[i]);
    score.value += product;
    score.size += fabs(product);
  }
  return {score.value * work.scale, score.size * fabs(work.scale)};
}

// A thread for each row and each `columns` columns.
__global__ void naive_kernel(NaiveWork work) {
  const std::int64_t parts = work.dim / columns;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t row = thread / parts;
  const std::int64_t first = thread % parts * columns;
  if (row >= work.rows) return;
  const std::int64_t token = row / work.heads;
  const std::int64_t kv_head = row % work.heads / (work.heads / work.kv_heads);
  const std::int64_t seen = work.causal ? token + work.shift + 1 : work.keys;
  const std::int64_t end = seen < 0 ? 0 : seen < work.keys ? seen : work.keys;
  const float* q = work.q + row * work.dim;
  double m = -HUGE_VAL;
  double score_size = 0;
  for (std::int64_t key = 0; key < end; ++key) {
    const Score score = score_of(work, q, work.k + (key * work.kv_heads + kv_head) * work.dim);
    m = score.value > m ? score.value : m;
    score_size = score.size > score_size ? score.size : score_size;
  }
  double l = 0;
  double value_size = 0;
  double output[columns] = {};
  double spread[columns] = {};
  for (std::int64_t key = 0; key < end; ++key) {
    const std::int64_t at = (key * work.kv_heads + kv_head) * work.dim;
    const double weight = exp2(score_of(work, q, work.k + at).value - m);
    l += weight;
    for (int i = 0; i < columns; ++i) {
      const double value = static_cast<double>(work.v[at + first + i]);
      output[i] += weight * value;
      spread[i] += weight * fabs(value);
      value_size = fabs(value) > value_size ? fabs(value) : value_size;
    }
  }
  const double sum = end > 0 ? l : 1.0;
  for (int i = 0; i < columns; ++i) {
    work.output[row * work.dim + first + i] = output[i] / sum;
    work.spread[row * work.dim + first + i] = spread[i] / sum;
  }
  work.value_size[thread] = value_size;
  if (first != 0) return;
  work.lse[row] = m + log2(l);
  work.score_size[row] = score_size;
}

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t count) : memory_(static_cast<std::int64_t>(count * sizeof(T))) {}
  explicit DeviceArray(const std::vector<T>& from) : DeviceArray(from.size()) {
    STREAM_CQSA_CUDA_CHECK(
        cudaMemcpy(data(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  void copy_to(std::vector<T>& to) const {
    STREAM_CQSA_CUDA_CHECK(
        cudaMemcpy(to.data(), data(), to.size() * sizeof(T), cudaMemcpyDeviceToHost));
  }

 private:
  cuda::DeviceMemory memory_;
};

void count_keys(const AttentionCase& attention, bool causal, std::int64_t keys,
                CaseReference& reference) {
  for (std::int64_t row = 0; row < attention.rows(); ++row) {
    const std::int64_t seen = row / attention.heads + attention.causal_shift + 1;
    reference.keys[static_cast<std::size_t>(row)] = !causal || seen > keys ? keys
                                                    : seen < 0             ? 0
                                                                           : seen;
  }
}

}  // namespace

CaseReference naive_attention(const AttentionCase& attention, bool causal) {
  constexpr std::int64_t threads = 128;
  const std::int64_t rows = attention.rows();
  const std::int64_t parts = attention.dim / columns;
  const auto chunks = static_cast<std::int64_t>(attention.keys.size());
  const std::int64_t keys = AttentionCase::first_position(attention.keys, chunks);
  CaseReference reference(rows, attention.dim);
  const DeviceArray<float> q(attention.q.elements), k(attention.k.elements),
      v(attention.v.elements);
  const DeviceArray<double> output(reference.output.size()), spread(reference.spread.size());
  const DeviceArray<double> lse(reference.lse.size()), score_size(reference.lse.size());
  std::vector<double> value_sizes(static_cast<std::size_t>(rows * parts));
  const DeviceArray<double> value_size(value_sizes.size());
  const NaiveWork work{q.data(),
                       k.data(),
                       v.data(),
                       output.data(),
                       spread.data(),
                       lse.data(),
                       score_size.data(),
                       value_size.data(),
                       rows,
                       keys,
                       attention.heads,
                       attention.kv_heads,
                       attention.dim,
                       attention.causal_shift,
                       static_cast<double>(attention.scale_log2),
                       causal};
  const auto blocks = static_cast<unsigned>(ceil_div(rows * parts, threads));
  naive_kernel<<<blocks, static_cast<unsigned>(threads)>>>(work);
  STREAM_CQSA_CUDA_CHECK(cudaGetLastError());
  STREAM_CQSA_CUDA_CHECK(cudaDeviceSynchronize());
  output.copy_to(reference.output);
  spread.copy_to(reference.spread);
  lse.copy_to(reference.lse);
  score_size.copy_to(reference.score_size);
  value_size.copy_to(value_sizes);
  for (std::size_t i = 0; i < value_sizes.size(); ++i) {
    double& largest = reference.value_size[i / static_cast<std::size_t>(parts)];
    largest = value_sizes[i] > largest ? value_sizes[i] : largest;
  }
  count_keys(attention, causal, keys, reference);
  return reference;
}

}  // namespace stream_cqsa::testing
