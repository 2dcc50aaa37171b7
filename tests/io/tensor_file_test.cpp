// Tensors read from and written to files and memory, against whole tensors taken apart by hand.
#define BOOST_TEST_MODULE io_tensor_file
#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <thread>

#include "io_testing.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

struct Case {
  TensorDesc desc;
  std::string data;  ///< the whole tensor in desc's dtype and layout
};

Case random_case(std::mt19937_64& random, DType dtype, Layout layout, int rank) {
  const auto extent = [&](std::uint64_t most) {
    return static_cast<std::int64_t>(random() % most + 1);
  };
  TensorDesc desc;
  desc.dtype = dtype;
  desc.layout = layout;
  desc.rank = rank;
  if (rank == 4) desc.batch = extent(3);
  desc.tokens = extent(50);
  if (rank > 2) desc.heads = extent(5);
  desc.dim = extent(40);
  return {desc, random_elements(random, dtype, desc.elements())};
}

Block random_block(std::mt19937_64& random, const TensorDesc& desc) {
  const Range batch = random_range(random, desc.batch);
  return {batch.begin, random_range(random, desc.tokens), random_range(random, desc.heads)};
}

Block readable(const TensorDesc& desc, Block block) {
  block.heads = desc.readable_heads(block.heads);
  return block;
}

/// Every supported kind of tensor, some of each.
template <typename Check>
void for_random_cases(std::uint64_t seed, Check&& check) {
  std::mt19937_64 random(seed);
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
      for (const int rank : {2, 3, 4}) {
        for (int repeat = 0; repeat < 3; ++repeat) {
          const Case one = random_case(random, dtype, layout, rank);
          BOOST_TEST_CONTEXT("seed " << seed << " " << name_of(dtype) << " " << name_of(layout)
                                     << " rank " << rank << " repeat " << repeat) {
            check(random, one);
          }
        }
      }
    }
  }
}

void write_all(TensorSink& sink, const std::string& data) {
  const TensorDesc& desc = sink.desc();
  for (std::int64_t b = 0; b < desc.batch; ++b) {
    const Block block{b, {0, desc.tokens}, {0, desc.heads}};
    sink.write(block, bytes_of(block_of(desc, data, block, Layout::bshd, size_of(desc.dtype))));
  }
}

std::string stored_block(const Case& one, const Block& block, Layout order) {
  const DType stored = storage_type(one.desc.dtype);
  return block_of(one.desc, as_stored(one.desc.dtype, one.data), block, order, size_of(stored));
}

TensorDesc small_desc() { return {"o", DType::f32, Layout::bshd, 3, 1, 6, 4, 8}; }

}  // namespace

BOOST_AUTO_TEST_CASE(layouts_have_names) {
  for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
    BOOST_TEST((parse_layout(name_of(layout)) == layout));
  }
  BOOST_TEST(!parse_layout("bsd").has_value());
}

BOOST_AUTO_TEST_CASE(blocks_of_written_files_read_back) {
  const TemporaryDirectory folder;
  for_random_cases(1, [&](std::mt19937_64& random, const Case& one) {
    const bool npy = one.desc.dtype != DType::bf16 && random() % 2 == 0;
    const auto path = folder / (npy ? "t.npy" : "t.safetensors");
    const auto sink = create_tensor(path, "q", one.desc, true);
    write_all(*sink, one.data);
    sink->commit();
    // The file ends with the whole tensor exactly.
    BOOST_TEST(read_file(path).ends_with(one.data));

    const auto source = open_tensor(path, "query|q", one.desc.layout);
    BOOST_TEST(source->desc().name == path.string() + (npy ? "" : ":q"));
    BOOST_TEST(source->desc().shape() == one.desc.shape(), boost::test_tools::per_element());
    BOOST_TEST((source->desc().dtype == one.desc.dtype));
    BOOST_TEST(source->desc().tokens == one.desc.tokens);
    for (int i = 0; i < 10; ++i) {
      const Block block = readable(one.desc, random_block(random, one.desc));
      BOOST_TEST((read_block(*source, block) == stored_block(one, block, one.desc.layout)));
    }
  });
}

BOOST_AUTO_TEST_CASE(an_unfinished_tensor_is_continued) {
  const TemporaryDirectory folder;
  for_random_cases(7, [&](std::mt19937_64& random, const Case& one) {
    const auto path = folder / "t.safetensors";
    const auto packed = [&](const Block& block) {
      return block_of(one.desc, one.data, block, Layout::bshd, size_of(one.desc.dtype));
    };
    const auto open = [&] {
      return create_tensor(path, "q", one.desc, true, open_posix_file, true);
    };
    const Block first = random_block(random, one.desc);
    {
      const auto sink = open();
      sink->write(first, bytes_of(packed(first)));
      sink->sync();
    }
    const auto sink = open();
    std::string back(packed(first).size(), '\0');
    sink->read(first, std::as_writable_bytes(std::span(back)));
    BOOST_TEST((back == packed(first)));
    write_all(*sink, one.data);
    for (int i = 0; i < 5; ++i) {
      const Block block = random_block(random, one.desc);
      back.resize(packed(block).size());
      sink->read(block, std::as_writable_bytes(std::span(back)));
      BOOST_TEST((back == packed(block)));
    }
    sink->commit();
    BOOST_TEST(read_file(path).ends_with(one.data));
    BOOST_TEST(!std::filesystem::exists(path.string() + ".partial"));
  });
}

BOOST_AUTO_TEST_CASE(head_groups_in_any_order_make_the_whole) {
  const TemporaryDirectory folder;
  for_random_cases(2, [&](std::mt19937_64& random, const Case& one) {
    std::vector<Block> blocks;
    for (std::int64_t b = 0; b < one.desc.batch; ++b) {
      const auto cut = random_range(random, one.desc.tokens).begin;
      const auto head = random_range(random, one.desc.heads).begin;
      for (const Range tokens : {Range{0, cut}, Range{cut, one.desc.tokens}}) {
        blocks.push_back({b, tokens, {0, head}});
        blocks.push_back({b, tokens, {head, one.desc.heads}});
      }
    }
    std::shuffle(blocks.begin(), blocks.end(), random);
    const auto file = create_tensor(folder / "t.safetensors", "q", one.desc, true);
    std::string memory(one.data.size(), '\0');
    const auto in_memory = make_memory_sink(one.desc, std::as_writable_bytes(std::span(memory)));
    for (const Block& block : blocks) {
      const std::string packed =
          block_of(one.desc, one.data, block, Layout::bshd, size_of(one.desc.dtype));
      file->write(block, bytes_of(packed));
      in_memory->write(block, bytes_of(packed));
    }
    file->commit();
    in_memory->commit();
    BOOST_TEST(read_file(folder / "t.safetensors").ends_with(one.data));
    BOOST_TEST((memory == one.data));
  });
}

BOOST_AUTO_TEST_CASE(memory_sources_lie_where_they_say) {
  for_random_cases(3, [&](std::mt19937_64& random, const Case& one) {
    const std::string stored = as_stored(one.desc.dtype, one.data);
    const auto source = make_memory_source(one.desc, bytes_of(stored));
    const auto vector_bytes =
        static_cast<std::size_t>(one.desc.dim * size_of(storage_type(one.desc.dtype)));
    for (int i = 0; i < 10; ++i) {
      const Block block = random_block(random, one.desc);
      const auto rows = source->resident(block);
      BOOST_REQUIRE(rows.has_value());
      std::string gathered;
      for (std::int64_t t = 0; t < block.tokens.size(); ++t) {
        for (std::int64_t h = 0; h < block.heads.size(); ++h) {
          const auto* at = rows->data + t * rows->token_stride + h * rows->head_stride;
          gathered.append(reinterpret_cast<const char*>(at), vector_bytes);
        }
      }
      BOOST_TEST((gathered == stored_block(one, block, Layout::bshd)));
      const Block whole = readable(one.desc, block);
      BOOST_TEST((read_block(*source, whole) == stored_block(one, whole, one.desc.layout)));
    }
  });
  const std::string short_memory(6 * 4 * 8 * 4 - 1, '\0');
  BOOST_TEST(contains(
      message_of<InputError>([&] { make_memory_source(small_desc(), bytes_of(short_memory)); }),
      "768 are needed"));
}

BOOST_AUTO_TEST_CASE(only_what_a_block_needs_is_read_in_large_requests) {
  const TemporaryDirectory folder;
  for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
    const TensorDesc desc{"q", DType::f64, layout, 4, 2, 20'000, 4, 16};
    create_tensor(folder / "q.npy", "", desc, true)->commit();
    Requests requests;
    const auto source = open_tensor(folder / "q.npy", "", layout, counting(requests));
    BOOST_TEST(requests.bytes_read < 1000u);
    requests = {};
    read_block(*source, {1, {5'000, 15'000}, {0, 4}});
    BOOST_TEST(requests.bytes_read == 10'000u * 4 * 16 * 8);
    // 5 MB through a buffer of 1 MiB; each of the 4 heads of bhsd is 1.3 MB on its own.
    BOOST_TEST(requests.reads <= 8);
  }
}

BOOST_AUTO_TEST_CASE(head_groups_are_written_in_large_requests) {
  const TemporaryDirectory folder;
  for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
    const TensorDesc desc{"o", DType::f16, layout, 3, 1, 20'000, 8, 64};
    Requests requests;
    const auto sink = create_tensor(folder / "o.npy", "", desc, true, counting(requests));
    requests = {};
    const std::string packed(20'000 * 2 * 64 * 2, 'x');
    sink->write({0, {0, 20'000}, {2, 4}}, bytes_of(packed));
    BOOST_TEST(requests.writes <= 21);
    BOOST_TEST(requests.reads <= 20);
    requests = {};
    const Block whole{0, {0, 20'000}, layout == Layout::bshd ? Range{0, 8} : Range{7, 8}};
    const std::string run(static_cast<std::size_t>(whole.vectors()) * 128, 'y');
    sink->write(whole, bytes_of(run));
    BOOST_TEST(requests.writes == 1);
    BOOST_TEST(requests.reads == 0);
  }
}

BOOST_AUTO_TEST_CASE(long_parts_of_token_rows_are_written_alone) {
  const TemporaryDirectory folder;
  std::mt19937_64 random(7);
  // Parts of 4096 bytes a token are written alone, those of 4092 are not.
  for (const std::int64_t dim : {1024, 1023}) {
    const TensorDesc desc{"o", DType::f32, Layout::bshd, 4, 2, 20, 3, dim};
    const Case one{desc, random_elements(random, desc.dtype, desc.elements())};
    Requests requests;
    const auto sink = create_tensor(folder / "o.npy", "", desc, true, counting(requests));
    requests = {};
    for (std::int64_t h = 0; h < 3; ++h) {
      for (std::int64_t b = 0; b < 2; ++b) {
        const Block block{b, {0, 20}, {h, h + 1}};
        sink->write(block, bytes_of(block_of(desc, one.data, block, Layout::bshd, 4)));
      }
    }
    BOOST_TEST(requests.reads == (dim == 1024 ? 0 : 6));
    BOOST_TEST(requests.writes == (dim == 1024 ? 6 * 20 : 6));
    sink->commit();
    BOOST_TEST(read_file(folder / "o.npy").ends_with(one.data));
  }
}

BOOST_AUTO_TEST_CASE(token_rows_longer_than_the_buffer) {
  const TemporaryDirectory folder;
  const TensorDesc desc{"o", DType::f64, Layout::bshd, 3, 1, 3, 3, 70'000};
  std::mt19937_64 random(4);
  const Case one{desc, random_elements(random, desc.dtype, desc.elements())};
  const auto sink = create_tensor(folder / "o.npy", "", desc, true);
  for (const Range heads : {Range{1, 3}, Range{0, 1}}) {
    const Block block{0, {0, 3}, heads};
    sink->write(block, bytes_of(block_of(desc, one.data, block, Layout::bshd, 8)));
  }
  sink->commit();
  BOOST_TEST(read_file(folder / "o.npy").ends_with(one.data));
  const auto source = open_tensor(folder / "o.npy", "", Layout::bshd);
  const Block block{0, {1, 3}, {0, 3}};
  BOOST_TEST((read_block(*source, block) == stored_block(one, block, Layout::bshd)));
}

BOOST_AUTO_TEST_CASE(lse_is_batch_heads_tokens) {
  const TemporaryDirectory folder;
  for (const std::string name : {"lse.npy", "lse.safetensors"}) {
    const auto sink = create_tensor(folder / name, "lse", lse_desc(2, 3, 5), false);
    std::string data;
    for (int i = 0; i < 30; ++i) data += little_endian(static_cast<std::uint64_t>(i), 4);
    write_all(*sink, data);
    sink->commit();
    BOOST_TEST(contains(read_file(folder / name), name == "lse.npy" ? "(2, 3, 5)" : "[2,3,5]"));
    BOOST_TEST(read_file(folder / name).ends_with(data));
    // Opened as bhsd of rank 3, it is [heads, tokens, dim].
    BOOST_TEST(open_tensor(folder / name, "lse", Layout::bhsd)->desc().tokens == 3);
  }
}

BOOST_AUTO_TEST_CASE(the_name_appears_by_commit_alone) {
  const TemporaryDirectory folder;
  const auto path = folder / "o.npy";
  {
    const auto sink = create_tensor(path, "", small_desc(), false);
    BOOST_TEST(!std::filesystem::exists(path));
    BOOST_TEST(std::filesystem::exists(folder / "o.npy.partial"));
    const std::string data(768, 'x');
    write_all(*sink, data);
    BOOST_TEST(!std::filesystem::exists(path));
  }
  BOOST_TEST(folder.empty());
  // What a killed run left behind is no obstacle, and nothing of it remains.
  write_file(folder / "o.npy.partial", std::string(5000, 'z'));
  create_tensor(path, "", small_desc(), false)->commit();
  BOOST_TEST(read_file(path).size() == 128u + 768u);
  BOOST_TEST(!contains(read_file(path), "z"));
  BOOST_TEST(!std::filesystem::exists(folder / "o.npy.partial"));
  // An overwritten file stays as it is until the new one is complete.
  const std::string before = read_file(path);
  create_tensor(path, "", lse_desc(1, 1, 1), true);
  BOOST_TEST((read_file(path) == before));
  create_tensor(path, "", lse_desc(1, 1, 1), true)->commit();
  BOOST_TEST(read_file(path).size() == 128u + 4u);
}

BOOST_AUTO_TEST_CASE(several_tensors_make_one_file) {
  const TemporaryDirectory folder;
  const auto path = folder / "qkv.safetensors";
  std::mt19937_64 random(8);
  const std::vector<Case> cases = {random_case(random, DType::f32, Layout::bshd, 4),
                                   random_case(random, DType::bf16, Layout::bhsd, 4),
                                   random_case(random, DType::f64, Layout::bshd, 3)};
  const std::vector<std::string> names = {"q", "k", "v"};
  std::vector<TensorDesc> descs;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    descs.push_back(cases[i].desc);
    descs.back().name = names[i];
  }
  {
    const auto dropped = create_tensors(path, descs, false);
    for (std::size_t i = 0; i < cases.size(); ++i) write_all(*dropped[i], cases[i].data);
    dropped[0]->commit();
    dropped[2]->commit();
    BOOST_TEST(!std::filesystem::exists(path));
  }
  BOOST_TEST(folder.empty());

  auto sinks = create_tensors(path, descs, false);
  BOOST_TEST(sinks[1]->desc().name == path.string() + ":k");
  for (const std::size_t i : {2, 0, 1}) {
    write_all(*sinks[i], cases[i].data);
    sinks[i]->commit();
    sinks[i].reset();
    BOOST_TEST(std::filesystem::exists(path) == (i == 1));
  }
  BOOST_TEST(!std::filesystem::exists(folder / "qkv.safetensors.partial"));
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const TensorDesc& desc = cases[i].desc;
    const auto source = open_tensor(path, names[i], desc.layout);
    BOOST_TEST(source->desc().shape() == desc.shape(), boost::test_tools::per_element());
    for (std::int64_t b = 0; b < desc.batch; ++b) {
      const Block block{b, {0, desc.tokens}, {0, desc.heads}};
      BOOST_TEST((read_block(*source, block) == stored_block(cases[i], block, desc.layout)));
    }
  }
}

BOOST_AUTO_TEST_CASE(offsets_beyond_4_gib_and_elements_beyond_2_31) {
  const TemporaryDirectory folder;
  std::mt19937_64 random(5);
  for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
    const TensorDesc desc{"t", DType::f16, layout, 4, 2, (std::int64_t{1} << 26) + 5, 3, 16};
    BOOST_TEST(desc.elements() > std::int64_t{1} << 32);
    const std::int64_t last = desc.tokens;
    const std::vector<Block> blocks = {
        {0, {0, 2}, {0, 3}}, {1, {last / 2, last / 2 + 3}, {0, 3}}, {1, {last - 4, last}, {0, 3}}};
    std::vector<std::string> data;
    const auto sink = create_tensor(folder / "t.npy", "", desc, true);
    for (const Block& block : blocks) {
      data.push_back(random_elements(random, desc.dtype, block.vectors() * desc.dim));
      for (std::int64_t h = 0; h < 3; ++h) {
        // Head by head: with bshd that reads, changes and writes whole token rows.
        std::string part;
        for (std::int64_t t = 0; t < block.tokens.size(); ++t) {
          part += data.back().substr(static_cast<std::size_t>(t * 3 + h) * 32, 32);
        }
        sink->write({block.batch, block.tokens, {h, h + 1}}, bytes_of(part));
      }
    }
    sink->commit();
    const auto source = open_tensor(folder / "t.npy", "", layout);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const Block local{0, {0, blocks[i].tokens.size()}, {0, 3}};
      TensorDesc small = desc;
      small.layout = Layout::bshd;
      small.tokens = local.tokens.size();
      BOOST_TEST((read_block(*source, blocks[i]) == block_of(small, data[i], local, layout, 2)));
    }
    // The last token lies at the file's very end.
    std::ifstream file(folder / "t.npy", std::ios::binary);
    file.seekg(-32, std::ios::end);
    std::string end(32, '\0');
    file.read(end.data(), 32);
    BOOST_TEST((end == data[2].substr(data[2].size() - 32)));
  }
}

BOOST_AUTO_TEST_CASE(threads_read_at_once) {
  const TemporaryDirectory folder;
  std::mt19937_64 random(6);
  const Case one = random_case(random, DType::f64, Layout::bhsd, 4);
  const auto sink = create_tensor(folder / "q.npy", "", one.desc, true);
  write_all(*sink, one.data);
  sink->commit();
  const auto source = open_tensor(folder / "q.npy", "", Layout::bhsd);
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < wrong.size(); ++i) {
    threads.emplace_back([&, i] {
      std::mt19937_64 own(i);
      for (int n = 0; n < 200; ++n) {
        const Block block = random_block(own, one.desc);
        wrong[i] += read_block(*source, block) != stored_block(one, block, Layout::bhsd);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const int count : wrong) BOOST_TEST(count == 0);
}
