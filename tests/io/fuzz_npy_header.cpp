// libFuzzer: any bytes as the start of a .npy file either parse to a tensor inside the file or are
// an InputError.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "io/npy_header.hpp"
#include "stream_cqsa/error.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace stream_cqsa;
  try {
    const auto tensor = parse_npy_header(std::as_bytes(std::span(data, size)), size);
    const TensorDesc desc = describe(tensor, Layout::bhsd, "fuzz");
    if (tensor.offset > size) std::abort();
    if (static_cast<std::uint64_t>(desc.bytes()) > size - tensor.offset) std::abort();
  } catch (const InputError&) {
    return 0;
  }
  return 0;
}
