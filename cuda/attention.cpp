#include "cuda/attention.hpp"

#include <algorithm>

#include "cuda/attention_fma.hpp"
#include "cuda/attention_mma.hpp"
#if defined(STREAM_CQSA_HAS_HOPPER)
#include "cuda/attention_hopper.hpp"
#endif

namespace stream_cqsa::cuda {
namespace {

void launch_portable(DType storage, const AttentionWork& work, cudaStream_t stream) {
  switch (storage) {
    case DType::f16:
      return launch_attention_f16(work, stream);
    case DType::bf16:
      return launch_attention_bf16(work, stream);
    default:
      return launch_attention_f32(work, stream);
  }
}

#if defined(STREAM_CQSA_HAS_HOPPER)
AttentionWork in_portable_tiles(AttentionWork work) {
  work.queries = work.portable_queries;
  work.tiles = work.portable_tiles;
  return work;
}
#endif

}  // namespace

AttentionTile portable_attention_tile(DType storage, std::int64_t dim) {
  return storage == DType::f32 ? attention_fma_tile(dim) : attention_mma_tile(dim);
}

#if defined(STREAM_CQSA_HAS_HOPPER)

std::string_view attention_kernel(DType storage, std::int64_t dim) {
  return hopper_computes(storage, dim) ? "Hopper" : "portable";
}

AttentionTile attention_tile(DType storage, std::int64_t dim) {
  if (hopper_computes(storage, dim)) return attention_hopper_tile(dim);
  return portable_attention_tile(storage, dim);
}

void launch_attention(DType storage, const AttentionWork& work, cudaStream_t stream) {
  AttentionWork only = work;  // nobody asks the flag
  only.non_finite = nullptr;
  if (work.key_pool.base == nullptr || !hopper_computes(storage, work.dim)) {
    return launch_portable(storage, only, stream);
  }
  if (std::max(work.query_pool.tokens, work.key_pool.tokens) > most_pool_tokens) {
    return launch_portable(storage, in_portable_tiles(only), stream);
  }
  if (work.any_partial == 0) return launch_attention_hopper(storage, only, stream);
  // Of the two only one computes, as the flag says.
  launch_find_non_finite(storage, work, stream);
  launch_attention_hopper(storage, work, stream);
  launch_portable(storage, in_portable_tiles(work), stream);
}

#else

std::string_view attention_kernel(DType, std::int64_t) { return "portable"; }

AttentionTile attention_tile(DType storage, std::int64_t dim) {
  return portable_attention_tile(storage, dim);
}

void launch_attention(DType storage, const AttentionWork& work, cudaStream_t stream) {
  AttentionWork only = work;
  only.non_finite = nullptr;
  launch_portable(storage, only, stream);
}

#endif

}  // namespace stream_cqsa::cuda
