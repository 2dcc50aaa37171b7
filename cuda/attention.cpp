#include "cuda/attention.hpp"

#include "cuda/attention_fma.hpp"
#include "cuda/attention_mma.hpp"

namespace stream_cqsa::cuda {

AttentionTile attention_tile(DType storage, std::int64_t dim) {
  return storage == DType::f32 ? attention_fma_tile(dim) : attention_mma_tile(dim);
}

void launch_attention(DType storage, const AttentionWork& work, cudaStream_t stream) {
  switch (storage) {
    case DType::f16:
      return launch_attention_f16(work, stream);
    case DType::bf16:
      return launch_attention_bf16(work, stream);
    default:
      return launch_attention_f32(work, stream);
  }
}

}  // namespace stream_cqsa::cuda
