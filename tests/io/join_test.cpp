// Tensors that several processes write, each some token rows.
#define BOOST_TEST_MODULE io_join
#include <array>
#include <boost/test/unit_test.hpp>
#include <stdexcept>
#include <vector>

#include "io_testing.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

TensorDesc random_desc(std::mt19937_64& random, int rank) {
  const auto extent = [&](std::uint64_t most) {
    return static_cast<std::int64_t>(random() % most + 1);
  };
  TensorDesc desc;
  desc.dtype = std::array{DType::f16, DType::f32, DType::f64}[random() % 3];
  desc.layout = random() % 2 ? Layout::bshd : Layout::bhsd;
  desc.rank = rank;
  desc.batch = rank == 4 ? extent(3) : 1;
  desc.tokens = extent(60);
  desc.heads = rank > 2 ? extent(5) : 1;
  desc.dim = extent(40);
  return desc;
}

std::string packed(const TensorDesc& desc, const std::string& data, const Block& block) {
  return block_of(desc, data, block, Layout::bshd, size_of(desc.dtype));
}

// Some tokens of each batch entry, head by head.
void write_tokens(TensorSink& sink, const TensorDesc& desc, const std::string& data, Range tokens) {
  if (tokens.empty()) return;
  for (std::int64_t batch = 0; batch < desc.batch; ++batch) {
    for (std::int64_t head = 0; head < desc.heads; ++head) {
      const Block block{batch, tokens, {head, head + 1}};
      sink.write(block, bytes_of(packed(desc, data, block)));
    }
  }
}

}  // namespace

BOOST_AUTO_TEST_CASE(what_several_write_is_what_one_writes) {
  const TemporaryDirectory directory;
  std::mt19937_64 random(1);
  for (int trial = 0; trial < 60; ++trial) {
    TensorDesc desc = random_desc(random, 2 + trial % 3);
    desc.name = "o";
    const std::string extension = trial % 2 ? ".npy" : ".safetensors";
    if (trial % 2 == 0 && desc.dtype == DType::f64) desc.dtype = DType::f32;
    const std::string data = random_elements(random, desc.dtype, desc.elements());
    const auto one = directory / ("one" + extension);
    const auto several = directory / ("several" + extension);
    const auto alone = create_tensor(one, "o", desc, true);
    write_tokens(*alone, desc, data, {0, desc.tokens});
    alone->commit();

    const auto created = create_tensor(several, "o", desc, true);
    // As a rank that knows the extents alone describes it.
    TensorDesc extents = desc;
    extents.rank = 4;
    const auto joined = join_tensor(several, "o", extents), third = join_tensor(several, "o", desc);
    const Range middle = random_range(random, desc.tokens);
    write_tokens(*third, desc, data, {0, middle.begin});
    write_tokens(*joined, desc, data, middle);
    write_tokens(*created, desc, data, {middle.end, desc.tokens});
    joined->sync();
    const Block block{0, {middle.begin, middle.begin + 1}, {0, desc.heads}};
    std::vector<std::byte> back(packed(desc, data, block).size());
    joined->read(block, back);
    BOOST_TEST((std::string(reinterpret_cast<const char*>(back.data()), back.size()) ==
                packed(desc, data, block)));
    BOOST_CHECK_THROW(joined->commit(), std::logic_error);
    created->commit();
    BOOST_TEST((read_file(several) == read_file(one)));
  }
}

BOOST_AUTO_TEST_CASE(what_is_not_there_or_another_tensor_is_refused) {
  const TemporaryDirectory directory;
  TensorDesc desc;
  desc.name = "o";
  desc.batch = 2;
  desc.tokens = 10;
  desc.heads = 3;
  desc.dim = 4;
  const auto path = directory / "o.npy";
  BOOST_TEST(
      contains(message_of<InputError>([&] { join_tensor(path, "o", desc); }), "o.npy.partial"));
  BOOST_TEST(!std::filesystem::exists(directory / "o.npy.partial"));
  const auto created = create_tensor(path, "o", desc, false);
  TensorDesc longer = desc;
  longer.tokens = 11;
  BOOST_TEST(
      contains(message_of<InputError>([&] { join_tensor(path, "o", longer); }), "another tensor"));
  TensorDesc half = desc;
  half.dtype = DType::f16;
  BOOST_TEST(
      contains(message_of<InputError>([&] { join_tensor(path, "o", half); }), "another tensor"));
}
