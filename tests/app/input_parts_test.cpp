// What workers read: every part of an input is counted once, and other bytes are found.
#define BOOST_TEST_MODULE input_parts
#include "app/input_parts.hpp"

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <random>

#include "stream_cqsa/error.hpp"
#include "support/attention.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;
using nlohmann::json;

namespace {

constexpr std::int64_t block_tokens = 10;

Fingerprint of_block(const TestTensor& tensor, const Block& block) {
  const auto source = block_source(tensor);
  const DType dtype = storage_type(tensor.desc.dtype);
  const std::int64_t vector_bytes = tensor.desc.dim * size_of(dtype);
  std::vector<std::byte> data(static_cast<std::size_t>(block.vectors() * vector_bytes));
  source->read(block, data);
  Fingerprint fingerprint;
  fingerprint.add(tensor.desc, dtype, block,
                  packed_rows(data.data(), block, tensor.desc.layout, vector_bytes));
  return fingerprint;
}

std::vector<Block> blocks_of(const TensorDesc& desc) {
  std::vector<Block> blocks;
  const std::int64_t heads = desc.layout == Layout::bshd ? desc.heads : 1;
  for (std::int64_t batch = 0; batch < desc.batch; ++batch) {
    for (std::int64_t head = 0; head < desc.heads; head += heads) {
      for (std::int64_t token = 0; token < desc.tokens; token += block_tokens) {
        blocks.push_back(
            {batch, {token, std::min(token + block_tokens, desc.tokens)}, {head, head + heads}});
      }
    }
  }
  return blocks;
}

InputParts read(const TestTensor& tensor, const std::vector<Block>& blocks) {
  InputParts parts;
  for (const Block& block : blocks) {
    if (parts.claim(block)) parts.set(block, of_block(tensor, block));
  }
  return parts;
}

json report(const InputParts& query, const InputParts& key, const InputParts& value) {
  return {
      {"rank", 1},
      {"inputs", {{"query", query.to_text()}, {"key", key.to_text()}, {"value", value.to_text()}}}};
}

TestTensor tensor_of(Layout layout, std::mt19937_64& random) {
  TensorDesc desc{"t", DType::f16, layout, 4, 2, 57, 3, 8, false};
  return random_tensor(desc, 1.0, random);
}

}  // namespace

BOOST_AUTO_TEST_CASE(parts_that_several_workers_read_are_counted_once) {
  std::mt19937_64 random(1);
  for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
    TestTensor tensor = tensor_of(layout, random);
    set_element(tensor, 1, 13, 2, 5, NAN);
    set_element(tensor, 0, 50, 0, 0, -INFINITY);
    const std::vector<Block> all = blocks_of(tensor.desc);
    std::vector<Block> first, second, third;
    for (const Block& block : all) {
      const auto draw = 1 + random() % 7;  // at least one of them reads it
      if (draw & 1) first.push_back(block);
      if (draw & 2) second.push_back(block);
      if (draw & 4) third.push_back(block);
    }
    const InputParts none;
    std::vector<json> reports;
    for (const auto& blocks : {first, second, third})
      reports.push_back(report(read(tensor, blocks), none, read(tensor, {all.front()})));
    // As it travels.
    for (json& each : reports) each = json::parse(each.dump());
    const ReadInputs inputs = take_inputs(reports);
    BOOST_TEST(inputs.differing == "");
    Fingerprint expected = of_block(tensor, {0, {0, 57}, {0, 3}});
    expected += of_block(tensor, {1, {0, 57}, {0, 3}});
    BOOST_TEST((inputs.query == expected));
    BOOST_TEST(inputs.query.vectors == 2 * 57 * 3);
    BOOST_TEST(inputs.query.non_finite.nan == 1);
    BOOST_TEST(inputs.query.non_finite.infinite == 1);
    BOOST_TEST((inputs.key == Fingerprint()));
    BOOST_TEST((inputs.value == of_block(tensor, all.front())));
    for (const json& each : reports) BOOST_TEST(each.dump() == "{\"rank\":1}");
  }
}

BOOST_AUTO_TEST_CASE(workers_that_read_other_bytes_are_found) {
  std::mt19937_64 random(2);
  const TestTensor tensor = tensor_of(Layout::bshd, random);
  TestTensor other = tensor;
  set_element(other, 1, 24, 2, 3, tensor.at(1, 24, 2, 3) + 1);
  const InputParts whole = read(tensor, blocks_of(tensor.desc)),
                   changed = read(other, blocks_of(tensor.desc));
  std::vector<json> reports = {report(whole, whole, whole), report(whole, changed, whole)};
  const ReadInputs inputs = take_inputs(reports);
  BOOST_TEST(inputs.differing.find("rank 2 read another key") == 0);
  BOOST_TEST(inputs.differing.find("batch 1, token 20, head 0") != std::string::npos);
}

BOOST_AUTO_TEST_CASE(the_text_is_short_and_says_all) {
  std::mt19937_64 random(3);
  InputParts parts;
  Fingerprint total;
  for (std::int64_t i = 0; i < 1000; ++i) {
    const Block block{i / 500, {i % 500 * 64, (i % 500 + 1) * 64}, {0, 4}};
    Fingerprint fingerprint{random(), i % 500 == 499 ? 100 : 256, {i % 100 == 7, i % 200 == 9}};
    parts.claim(block);
    parts.set(block, fingerprint);
    total += fingerprint;
  }
  const std::string text = parts.to_text();
  BOOST_TEST(text.size() < 18 * 1000);
  InputParts again = InputParts::from_text(text);
  BOOST_TEST((again.total() == total));
  BOOST_TEST(!again.add(parts).has_value());
  BOOST_TEST(again.to_text() == text);
  BOOST_TEST(InputParts().to_text() == "");
  BOOST_TEST(InputParts::from_text("").total().vectors == 0);
  BOOST_CHECK_THROW(InputParts::from_text("@0,0,x"), Error);
}

BOOST_AUTO_TEST_CASE(a_report_without_inputs_counts_nothing) {
  std::vector<json> reports = {json{{"rank", 1}}};
  const ReadInputs inputs = take_inputs(reports);
  BOOST_TEST(inputs.differing == "");
  BOOST_TEST(inputs.query.vectors == 0);
}
