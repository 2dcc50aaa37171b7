// Tensors written from several threads at once, in head groups, against whole tensors taken apart
// by hand. No MPI: this runs under the thread sanitizer.
#define BOOST_TEST_MODULE io_tensor_threads
#include <algorithm>
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <mutex>
#include <thread>

#include "io_testing.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

struct Case {
  TensorDesc desc;
  std::string data;  ///< the whole tensor in desc's dtype and layout
};

/// Some with rows of many MiB in all, so that they are more than one buffer.
Case random_case(std::mt19937_64& random, bool large) {
  const auto extent = [&](std::uint64_t most) {
    return static_cast<std::int64_t>(random() % most + 1);
  };
  TensorDesc desc;
  desc.dtype = random() % 2 ? DType::f16 : DType::f32;
  desc.layout = random() % 4 ? Layout::bshd : Layout::bhsd;
  desc.batch = extent(2);
  desc.heads = 1 + extent(6);
  desc.dim = large ? 40 + extent(100) : extent(40);
  if (random() % 8 == 0) desc.dim *= 20;  // parts that are written token by token
  const std::int64_t row_bytes = desc.heads * desc.dim * size_of(desc.dtype);
  desc.tokens = large ? (3 << 20) / row_bytes / desc.batch + extent(100) : extent(60);
  return {desc, random_elements(random, desc.dtype, desc.elements())};
}

std::vector<Range> random_cuts(std::mt19937_64& random, std::int64_t extent, std::int64_t most) {
  std::vector<Range> ranges;
  for (std::int64_t begin = 0; begin < extent;) {
    const auto size = 1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(most));
    ranges.push_back({begin, std::min(extent, begin + size)});
    begin = ranges.back().end;
  }
  return ranges;
}

/// Blocks that are the tensor, each element once, in random order.
std::vector<Block> random_blocks(std::mt19937_64& random, const TensorDesc& desc) {
  std::vector<Block> blocks;
  for (std::int64_t batch = 0; batch < desc.batch; ++batch) {
    for (const Range tokens : random_cuts(random, desc.tokens, 1 + desc.tokens / 3)) {
      for (const Range heads : random_cuts(random, desc.heads, desc.heads)) {
        blocks.push_back({batch, tokens, heads});
      }
    }
  }
  std::shuffle(blocks.begin(), blocks.end(), random);
  return blocks;
}

Block random_block(std::mt19937_64& random, const TensorDesc& desc) {
  return {random_range(random, desc.batch).begin, random_range(random, desc.tokens),
          random_range(random, desc.heads)};
}

std::string packed(const Case& one, const Block& block) {
  return block_of(one.desc, one.data, block, Layout::bshd, size_of(one.desc.dtype));
}

void write_at_once(TensorSink& sink, const Case& one, const std::vector<Block>& blocks) {
  std::atomic<std::size_t> next{0};
  std::vector<std::jthread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (std::size_t at; (at = next++) < blocks.size();) {
        sink.write(blocks[at], bytes_of(packed(one, blocks[at])));
      }
    });
  }
}

int wrong_reads(TensorSink& sink, const Case& one, std::mt19937_64& random) {
  int wrong = 0;
  for (int i = 0; i < 5; ++i) {
    const Block block = random_block(random, one.desc);
    std::string back(packed(one, block).size(), '\x55');
    sink.read(block, std::as_writable_bytes(std::span(back)));
    wrong += back != packed(one, block);
  }
  return wrong;
}

}  // namespace

BOOST_AUTO_TEST_CASE(threads_write_head_groups_at_once) {
  const TemporaryDirectory folder;
  const auto path = folder / "t.safetensors";
  for (std::uint64_t seed = 0; seed < trials<std::uint64_t>(60); ++seed) {
    BOOST_TEST_CONTEXT("seed " << seed) {
      std::mt19937_64 random(seed);
      const Case one = random_case(random, seed % 4 == 0);
      const auto blocks = random_blocks(random, one.desc);
      for (const bool staged : {false, true}) {
        const auto sink = create_tensor(path, "o", one.desc, true, open_posix_file, false, staged);
        write_at_once(*sink, one, blocks);
        BOOST_TEST(wrong_reads(*sink, one, random) == 0);
        sink->commit();
        BOOST_TEST(read_file(path).ends_with(one.data));
      }
      std::string memory(one.data.size(), '\0');
      const auto sink = make_memory_sink(one.desc, std::as_writable_bytes(std::span(memory)));
      write_at_once(*sink, one, blocks);
      BOOST_TEST((memory == one.data));
      BOOST_TEST(wrong_reads(*sink, one, random) == 0);
    }
  }
}

BOOST_AUTO_TEST_CASE(staged_blocks_read_back_and_may_be_written_again) {
  const TemporaryDirectory folder;
  const auto path = folder / "t.safetensors";
  for (std::uint64_t seed = 0; seed < trials<std::uint64_t>(60); ++seed) {
    BOOST_TEST_CONTEXT("seed " << seed) {
      std::mt19937_64 random(seed);
      Case one = random_case(random, seed % 8 == 0);
      const std::string written = one.data;
      std::ranges::fill(one.data, '\0');
      const auto vector = static_cast<std::size_t>(one.desc.dim * size_of(one.desc.dtype));
      const auto sink = create_tensor(path, "o", one.desc, true, open_posix_file, false, true);
      for (int i = 0; i < 12; ++i) {
        const Block block = random_block(random, one.desc);
        for (std::int64_t t = block.tokens.begin; t < block.tokens.end; ++t) {
          for (std::int64_t h = block.heads.begin; h < block.heads.end; ++h) {
            const std::size_t at =
                static_cast<std::size_t>(vector_at(one.desc, block.batch, t, h)) * vector;
            one.data.replace(at, vector, written, at, vector);
          }
        }
        sink->write(block, bytes_of(packed(one, block)));
        BOOST_TEST(wrong_reads(*sink, one, random) == 0);
      }
      sink->commit();  // what was never written is zero
      BOOST_TEST(read_file(path).ends_with(one.data));
    }
  }
}

BOOST_AUTO_TEST_CASE(staged_head_groups_are_written_twice_and_read_once) {
  const TemporaryDirectory folder;
  const TensorDesc desc{"o", DType::f16, Layout::bshd, 3, 1, 20'000, 8, 64};
  std::mt19937_64 random(1);
  const Case one{desc, random_elements(random, desc.dtype, desc.elements())};
  Requests requests;
  const auto sink =
      create_tensor(folder / "o.npy", "", desc, true, counting(requests), false, true);
  const std::uint64_t bytes = one.data.size();
  const int tiles = 20;  // of 1 MiB
  for (std::int64_t head = 0; head < 8; ++head) {
    requests = {};
    const Block block{0, {0, desc.tokens}, {head, head + 1}};
    sink->write(block, bytes_of(packed(one, block)));
    BOOST_TEST(requests.writes == tiles);
    BOOST_TEST(requests.bytes_written == (head < 7 ? bytes / 8 : bytes));
    BOOST_TEST(requests.bytes_read == (head < 7 ? 0 : bytes));
  }
  requests = {};
  sink->commit();
  BOOST_TEST(requests.writes == 0);
  BOOST_TEST(read_file(folder / "o.npy").ends_with(one.data));
}

BOOST_AUTO_TEST_CASE(an_output_that_is_kept_is_never_staged) {
  const TemporaryDirectory folder;
  std::mt19937_64 random(2);
  const TensorDesc desc{"o", DType::f16, Layout::bshd, 3, 1, 2'000, 8, 64};
  const Case one{desc, random_elements(random, desc.dtype, desc.elements())};
  const Block first{0, {0, desc.tokens}, {0, 3}};
  const Block second{0, {0, desc.tokens}, {3, 8}};
  create_tensor(folder / "o.npy", "", desc, true, open_posix_file, true, true)
      ->write(first, bytes_of(packed(one, first)));
  const auto sink = create_tensor(folder / "o.npy", "", desc, true, open_posix_file, true, true);
  sink->write(second, bytes_of(packed(one, second)));
  sink->commit();
  BOOST_TEST(read_file(folder / "o.npy").ends_with(one.data));
}
