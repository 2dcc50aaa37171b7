// Some rows of a tensor as a tensor of their own.
#define BOOST_TEST_MODULE io_row_source
#include <boost/test/unit_test.hpp>

#include "io_testing.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

struct Whole {
  TensorDesc desc;
  std::string data;

  std::unique_ptr<TensorSource> source() const { return make_memory_source(desc, bytes_of(data)); }
};

Whole random_tensor(std::mt19937_64& random, Layout layout) {
  const auto extent = [&] { return 1 + static_cast<std::int64_t>(random() % 9); };
  Whole whole;
  whole.desc = {"whole", DType::f16, layout, 4, extent(), extent(), extent(), extent()};
  whole.data = random_elements(random, DType::f16, whole.desc.elements());
  return whole;
}

Block random_block(std::mt19937_64& random, const TensorDesc& desc) {
  const auto batch = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(desc.batch));
  return {batch, random_range(random, desc.tokens),
          desc.readable_heads(random_range(random, desc.heads))};
}

// What lies where resident() says, in the order of the layout.
std::string resident_block(const TensorSource& source, const Block& block) {
  const TensorDesc& desc = source.desc();
  const StridedRows rows = source.resident(block).value();
  const auto bytes = static_cast<std::size_t>(desc.dim * size_of(desc.dtype));
  const bool tokens_first = desc.layout == Layout::bshd;
  const std::int64_t outer = tokens_first ? block.tokens.size() : block.heads.size();
  const std::int64_t inner = tokens_first ? block.heads.size() : block.tokens.size();
  std::string out;
  for (std::int64_t i = 0; i < outer; ++i) {
    for (std::int64_t j = 0; j < inner; ++j) {
      const std::int64_t token = tokens_first ? i : j;
      const std::int64_t head = tokens_first ? j : i;
      out.append(reinterpret_cast<const char*>(rows.data + token * rows.token_stride +
                                               head * rows.head_stride),
                 bytes);
    }
  }
  return out;
}

}  // namespace

BOOST_AUTO_TEST_CASE(blocks_are_those_of_the_whole_tensor) {
  const unsigned seed = 3;
  BOOST_TEST_CONTEXT("seed " << seed) {
    std::mt19937_64 random(seed);
    for (int trial = 0; trial < 2000; ++trial) {
      const Layout layout = trial % 2 == 0 ? Layout::bshd : Layout::bhsd;
      const Whole whole = random_tensor(random, layout);
      const Range rows = random_range(random, whole.desc.tokens);
      const auto part = make_row_source(whole.source(), rows);
      BOOST_REQUIRE_EQUAL(part->desc().tokens, rows.size());
      BOOST_REQUIRE_EQUAL(part->desc().batch, whole.desc.batch);
      const Block block = random_block(random, part->desc());
      Block moved = block;
      moved.tokens = {rows.begin + block.tokens.begin, rows.begin + block.tokens.end};
      const std::string expected = block_of(whole.desc, whole.data, moved, layout, 2);
      BOOST_REQUIRE(read_block(*part, block) == expected);
      BOOST_REQUIRE(resident_block(*part, block) == expected);
    }
  }
}

BOOST_AUTO_TEST_CASE(a_file_is_read_where_the_rows_are) {
  std::mt19937_64 random(5);
  const TemporaryDirectory folder;
  const std::string data = random_elements(random, DType::f32, 50 * 2 * 4);
  write_file(
      folder / "x.npy",
      npy_bytes(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (50, 2, 4), }\n", data));
  Requests requests;
  auto whole = open_tensor(folder / "x.npy", "", Layout::bshd, counting(requests));
  const TensorDesc desc = whole->desc();
  const auto part = make_row_source(std::move(whole), {20, 33});
  requests = {};
  const Block block{0, {1, 13}, {0, 2}};
  BOOST_TEST(read_block(*part, block) ==
             block_of(desc, data, {0, {21, 33}, {0, 2}}, Layout::bshd, 4));
  BOOST_TEST(requests.bytes_read == 12u * 2 * 4 * 4);
  BOOST_TEST(!part->resident(block).has_value());
}

BOOST_AUTO_TEST_CASE(rows_of_rows) {
  std::mt19937_64 random(9);
  const Whole whole{{"whole", DType::f16, Layout::bshd, 3, 1, 30, 2, 4},
                    random_elements(random, DType::f16, 30 * 2 * 4)};
  const auto part = make_row_source(make_row_source(whole.source(), {10, 20}), {3, 5});
  BOOST_TEST(read_block(*part, {0, {0, 2}, {0, 2}}) ==
             block_of(whole.desc, whole.data, {0, {13, 15}, {0, 2}}, Layout::bshd, 2));
}

BOOST_AUTO_TEST_CASE(rows_that_are_not_there_are_refused) {
  std::mt19937_64 random(1);
  const Whole whole{{"whole", DType::f16, Layout::bhsd, 4, 1, 8, 2, 4},
                    random_elements(random, DType::f16, 8 * 2 * 4)};
  for (const Range rows : {Range{-1, 3}, Range{3, 3}, Range{4, 3}, Range{5, 9}, Range{8, 9}}) {
    const std::string said = message_of<InputError>([&] { make_row_source(whole.source(), rows); });
    BOOST_TEST(contains(said, "8 tokens"), said);
  }
  const auto part = make_row_source(whole.source(), {2, 6});
  for (const Range rows : {Range{-1, 2}, Range{3, 5}, Range{4, 5}}) {
    const std::string said = message_of<Error>([&] { read_block(*part, {0, rows, {0, 2}}); });
    BOOST_TEST(contains(said, "not in the tensor"), said);
  }
}
