// What sinks that are watched say after several threads wrote to them at once.
#define BOOST_TEST_MODULE app_audit
#include "app/audit.hpp"

#include <atomic>
#include <boost/test/unit_test.hpp>
#include <thread>

#include "stream_cqsa/files.hpp"

using namespace stream_cqsa;

BOOST_AUTO_TEST_CASE(threads_write_to_a_watched_sink_at_once) {
  const TensorDesc desc{"o", DType::f32, Layout::bshd, 4, 2, 400, 3, 5};
  const auto count = static_cast<std::size_t>(desc.elements());
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<float>(i);
  // Blocks of ten tokens of one head, packed one after another.
  std::vector<Block> blocks;
  std::vector<std::vector<float>> packed;
  for (std::int64_t batch = 0; batch < desc.batch; ++batch) {
    for (std::int64_t head = 0; head < desc.heads; ++head) {
      for (std::int64_t token = 0; token < desc.tokens; token += 10) {
        blocks.push_back({batch, {token, token + 10}, {head, head + 1}});
        packed.emplace_back();
        for (std::int64_t t = token; t < token + 10; ++t) {
          const std::int64_t first = ((batch * desc.tokens + t) * desc.heads + head) * desc.dim;
          packed.back().insert(packed.back().end(), values.begin() + first,
                               values.begin() + first + desc.dim);
        }
      }
    }
  }
  std::vector<RowIndex> rows;
  for (std::int64_t token = 3; token < desc.tokens; token += 50) rows.push_back({1, token, 2});

  std::vector<float> memory(count, -1);
  const auto inner = make_memory_sink(desc, std::as_writable_bytes(std::span(memory)));
  Telemetry telemetry;
  AuditedSink sink(*inner, rows, telemetry);
  std::atomic<std::size_t> next{0};
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] {
        for (std::size_t at; (at = next++) < blocks.size();) {
          sink.write(blocks[at], std::as_bytes(std::span(packed[at])));
        }
      });
    }
  }
  BOOST_TEST((memory == values));
  Fingerprint whole;
  for (std::int64_t batch = 0; batch < desc.batch; ++batch) {
    const Block block{batch, {0, desc.tokens}, {0, desc.heads}};
    const std::int64_t first = batch * desc.tokens * desc.heads * desc.dim;
    whole.add(desc, desc.dtype, block,
              packed_rows(reinterpret_cast<const std::byte*>(values.data() + first), block,
                          Layout::bshd, desc.dim * size_of(desc.dtype)));
  }
  BOOST_TEST(sink.fingerprint().checksum == whole.checksum);
  BOOST_TEST(sink.fingerprint().vectors == whole.vectors);
  for (const RowIndex& row : rows) {
    const std::int64_t first =
        ((row.batch * desc.tokens + row.token) * desc.heads + row.head) * desc.dim;
    BOOST_TEST(sink.row(row) ==
                   std::vector<double>(values.begin() + first, values.begin() + first + desc.dim),
               boost::test_tools::per_element());
  }
  BOOST_TEST(sink.row({0, 3, 2}).empty());
}
