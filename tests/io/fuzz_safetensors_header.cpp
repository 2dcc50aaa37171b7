// libFuzzer: any bytes as a .safetensors file either list tensors inside the file or are an
// InputError.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "io/safetensors_header.hpp"
#include "stream_cqsa/error.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace stream_cqsa;
  try {
    const auto header = parse_safetensors_header(std::as_bytes(std::span(data, size)), size);
    for (const auto& entry : header.tensors) {
      if (entry.begin > entry.end || entry.end > size - header.data_offset) std::abort();
    }
    const StoredTensor tensor = find_tensor(header, "q|query|k|v").tensor;
    const TensorDesc desc = describe(tensor, Layout::bshd, "fuzz");
    if (tensor.offset > size) std::abort();
    if (static_cast<std::uint64_t>(desc.bytes()) > size - tensor.offset) std::abort();
  } catch (const InputError&) {
    return 0;
  }
  return 0;
}
