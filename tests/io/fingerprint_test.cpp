// Fingerprints against elements counted one by one, and against other cuts of the same tensor.
#define BOOST_TEST_MODULE io_fingerprint
#include "stream_cqsa/fingerprint.hpp"

#include <boost/test/unit_test.hpp>
#include <cstring>
#include <random>
#include <vector>

using namespace stream_cqsa;

namespace {

struct Case {
  DType dtype;
  std::vector<std::uint64_t> nans, infinities, largest;  // bits
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {DType::f16, {0x7c01, 0xfe00, 0xffff}, {0x7c00, 0xfc00}, {0x7bff, 0xfbff}},
      {DType::bf16, {0x7f81, 0xffc0, 0xffff}, {0x7f80, 0xff80}, {0x7f7f, 0xff7f}},
      {DType::f32, {0x7f800001, 0xffc00000}, {0x7f800000, 0xff800000}, {0x7f7fffff, 0xff7fffff}},
      {DType::f64,
       {0x7ff0000000000001, 0xfff8000000000000},
       {0x7ff0000000000000, 0xfff0000000000000},
       {0x7fefffffffffffff, 0xffefffffffffffff}}};
  return all;
}

Fingerprint of_block(const TensorDesc& desc, const std::vector<std::byte>& data,
                     const Block& block) {
  const std::int64_t bytes = desc.dim * size_of(desc.dtype);
  const std::int64_t first = (block.batch * desc.tokens + block.tokens.begin) * desc.heads;
  Fingerprint own;
  own.add(desc, desc.dtype, block,
          packed_rows(data.data() + first * bytes, block, Layout::bshd, bytes));
  return own;
}

}  // namespace

BOOST_AUTO_TEST_CASE(non_finite_elements_are_counted_and_cuts_do_not_matter) {
  std::mt19937_64 random(1);
  for (const Case& one : cases()) {
    const auto size = static_cast<std::size_t>(size_of(one.dtype));
    for (const std::int64_t dim : {1, 3, 8, 13, 64}) {
      const TensorDesc desc{"o", one.dtype, Layout::bshd, 4, 2, 31, 3, dim};
      std::vector<std::byte> data(static_cast<std::size_t>(desc.bytes()));
      NonFinite expected;
      for (std::size_t at = 0; at < data.size(); at += size) {
        const auto any = [&](const auto& from) { return from[random() % from.size()]; };
        std::uint64_t bits = random() % 2 ? any(one.largest) : random() % 0x3c00;
        if (random() % 50 == 0)
          bits = any(one.nans), ++expected.nan;
        else if (random() % 50 == 0)
          bits = any(one.infinities), ++expected.infinite;
        std::memcpy(&data[at], &bits, size);
      }
      Fingerprint whole, cut;
      for (std::int64_t batch = 0; batch < 2; ++batch) {
        whole += of_block(desc, data, {batch, {0, 31}, {0, 3}});
        for (std::int64_t token = 0; token < 31; token += 7)
          cut +=
              of_block(desc, data, {batch, {token, std::min<std::int64_t>(token + 7, 31)}, {0, 3}});
      }
      BOOST_TEST_CONTEXT(name_of(one.dtype) << ", dimension " << dim) {
        BOOST_TEST((whole.non_finite == expected));
        BOOST_TEST((whole == cut));
        BOOST_TEST(whole.vectors == 2 * 31 * 3);
        data[random() % data.size()] ^= std::byte{1};
        BOOST_TEST(of_block(desc, data, {0, {0, 31}, {0, 3}}).checksum +
                       of_block(desc, data, {1, {0, 31}, {0, 3}}).checksum !=
                   whole.checksum);
      }
    }
  }
}
