// Files past the page cache: the bytes of the usual path, whatever the range and the system.
#define BOOST_TEST_MODULE io_direct_file
#include "io/direct_file.hpp"

#include <algorithm>
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <cerrno>
#include <mutex>
#include <thread>
#include <vector>

#include "io_testing.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

std::string random_bytes(std::uint64_t seed, std::size_t count) {
  std::mt19937_64 random(seed);
  std::string bytes(count, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

std::string read_range(File& file, std::uint64_t offset, std::size_t count) {
  std::string bytes(count, '\x55');
  file.read_at(offset, std::as_writable_bytes(std::span(bytes)));
  return bytes;
}

void never_refused(const std::string& line) { BOOST_ERROR("refused: " << line); }

/// A disk of its own, which takes aligned requests alone.
struct FakeDisk {
  std::string bytes;
  std::size_t alignment = 4096;
  std::size_t most = std::size_t{1} << 30;  ///< bytes that a request gives
  int failure = 0;                          ///< errno of every request, or 0
  std::atomic<int> requests{0};
  std::atomic<std::size_t> smallest{std::size_t{1} << 30};

  ssize_t read(std::span<std::byte> into, std::uint64_t offset) {
    ++requests;
    smallest = std::min<std::size_t>(smallest, into.size());
    const auto address = reinterpret_cast<std::uintptr_t>(into.data());
    if ((address | offset | into.size()) % alignment != 0) failure = EINVAL;
    if (failure != 0) {
      errno = failure;
      return -1;
    }
    if (offset >= bytes.size()) return 0;
    const std::size_t count = std::min({into.size(), most, bytes.size() - offset});
    std::memcpy(into.data(), bytes.data() + offset, count);
    return static_cast<ssize_t>(count);
  }
  ssize_t write(std::span<const std::byte> from, std::uint64_t offset) {
    ++requests;
    const auto address = reinterpret_cast<std::uintptr_t>(from.data());
    if ((address | offset | from.size()) % alignment != 0) failure = EINVAL;
    if (failure != 0) {
      errno = failure;
      return -1;
    }
    const std::size_t count = std::min(from.size(), most);
    bytes.resize(std::max(bytes.size(), offset + count));
    std::memcpy(bytes.data() + offset, from.data(), count);
    return static_cast<ssize_t>(count);
  }
};

/// A file of the disk's bytes, and how it is read from the disk.
struct OnDisk {
  TemporaryDirectory folder;
  Requests usual;
  std::vector<std::string> said;
  std::shared_ptr<DirectBuffers> buffers =
      std::make_shared<DirectBuffers>([this](const std::string& line) { said.push_back(line); });

  std::unique_ptr<File> open(FakeDisk& disk, const std::string& name = "f") {
    return open(disk, name, FileMode::read, {});
  }
  std::unique_ptr<File> open_to_write(FakeDisk& disk, const std::string& name = "f") {
    return open(disk, name, FileMode::update,
                [&disk](std::span<const std::byte> from, std::uint64_t offset) {
                  return disk.write(from, offset);
                });
  }

 private:
  using Write = decltype(DirectAccess::write);
  std::unique_ptr<File> open(FakeDisk& disk, const std::string& name, FileMode mode, Write write) {
    write_file(folder / name, disk.bytes);
    DirectAccess access{disk.alignment,
                        [&disk](std::span<std::byte> into, std::uint64_t offset) {
                          return disk.read(into, offset);
                        },
                        std::move(write),
                        {}};
    return std::make_unique<DirectFile>(counting(usual)(folder / name, mode), name,
                                        std::move(access), buffers);
  }
};

constexpr std::size_t MiB = std::size_t{1} << 20;

}  // namespace

BOOST_AUTO_TEST_CASE(any_range_of_a_file_has_the_bytes_of_the_usual_path) {
  const TemporaryDirectory folder;
  for (const std::size_t size : {std::size_t{1}, std::size_t{511}, std::size_t{4095},
                                 std::size_t{4096}, std::size_t{4097}, MiB + 3, 5 * MiB + 4099}) {
    write_file(folder / "f", random_bytes(size, size));
    const auto usual = open_posix_file(folder / "f", FileMode::read);
    const auto file =
        direct_opener(open_posix_file, [](const std::string&) {})(folder / "f", FileMode::read);
    BOOST_TEST(file->size() == size);
    std::mt19937_64 random(size);
    for (int round = 0; round < 40; ++round) {
      const std::size_t begin = round == 0 ? 0 : random() % size;
      const std::size_t count = round % 4 == 0 ? size - begin : random() % (size - begin + 1);
      BOOST_TEST_INFO("bytes " << begin << " + " << count << " of " << size);
      BOOST_TEST((read_range(*file, begin, count) == read_range(*usual, begin, count)));
    }
  }
}

BOOST_AUTO_TEST_CASE(requests_are_aligned_and_large) {
  for (const std::size_t alignment : {std::size_t{4096}, DirectAccess::largest_alignment}) {
    OnDisk at;
    FakeDisk disk{random_bytes(3, 9 * MiB + 77), alignment};
    const auto file = at.open(disk);
    BOOST_TEST((read_range(*file, 130, 4 * MiB) == disk.bytes.substr(130, 4 * MiB)));
    BOOST_TEST(disk.requests == 2);
    BOOST_TEST(disk.smallest >= 2 * MiB);
    BOOST_TEST((read_range(*file, 1, disk.bytes.size() - 1) == disk.bytes.substr(1)));
    BOOST_TEST(disk.smallest >= MiB);
    std::mt19937_64 random(alignment);
    for (int round = 0; round < 100; ++round) {
      const std::size_t begin = random() % disk.bytes.size();
      const std::size_t count = 1 + random() % (disk.bytes.size() - begin);
      BOOST_TEST((read_range(*file, begin, count) == disk.bytes.substr(begin, count)));
    }
    BOOST_TEST(at.usual.reads == 0);
    BOOST_TEST(at.said.empty());
  }
}

BOOST_AUTO_TEST_CASE(what_comes_up_short_is_asked_for_again) {
  for (const std::size_t most : {std::size_t{4096}, std::size_t{5000}, std::size_t{100'000}}) {
    OnDisk at;
    FakeDisk disk{random_bytes(4, MiB / 2 + 5), 4096, most};
    const auto file = at.open(disk);
    for (const std::size_t begin : {std::size_t{0}, std::size_t{100}, std::size_t{4096}}) {
      BOOST_TEST((read_range(*file, begin, disk.bytes.size() - begin) == disk.bytes.substr(begin)));
    }
    BOOST_TEST(at.usual.reads == 0);
  }
}

BOOST_AUTO_TEST_CASE(threads_read_beside_each_other) {
  OnDisk at;
  FakeDisk disk{random_bytes(5, 3 * MiB + 1)};
  const auto file = at.open(disk);
  std::atomic<int> wrong{0};
  std::vector<std::jthread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937_64 random(seed);
      for (int round = 0; round < 30; ++round) {
        const std::size_t begin = random() % disk.bytes.size();
        const std::size_t count = 1 + random() % (disk.bytes.size() - begin);
        wrong += read_range(*file, begin, count) != disk.bytes.substr(begin, count);
      }
    });
  }
  threads.clear();
  BOOST_TEST(wrong == 0);
}

BOOST_AUTO_TEST_CASE(a_file_system_that_refuses_is_said_once_and_read_as_usual) {
  for (const int reason : {EINVAL, EOPNOTSUPP}) {
    OnDisk at;
    FakeDisk disk{random_bytes(6, 3 * MiB)};
    disk.failure = reason;
    const auto one = at.open(disk, "one"), two = at.open(disk, "two");
    for (int round = 0; round < 3; ++round) {
      for (const auto& file : {one.get(), two.get()})
        BOOST_TEST((read_range(*file, 7, 2 * MiB) == disk.bytes.substr(7, 2 * MiB)));
    }
    BOOST_TEST(disk.requests == 2);
    BOOST_TEST(at.usual.reads == 6);
    BOOST_REQUIRE(at.said.size() == 1u);
    BOOST_TEST(contains(at.said[0], "one has no direct access ("));
  }
}

BOOST_AUTO_TEST_CASE(a_file_without_such_access_is_the_usual_one) {
  std::vector<std::string> said;
  const FileOpener open =
      direct_opener(open_posix_file, [&](const std::string& line) { said.push_back(line); });
  const auto file = open("/proc/self/status", FileMode::read);  // has no blocks
  BOOST_TEST(read_range(*file, 0, 5) == "Name:");
  BOOST_TEST(said.size() == 1u);
}

BOOST_AUTO_TEST_CASE(read_errors_name_file_and_byte) {
  OnDisk at;
  FakeDisk disk{random_bytes(7, MiB)};
  disk.failure = EIO;
  const auto file = at.open(disk);
  const std::string what = message_of<Error>([&] { read_range(*file, 5000, 10); });
  BOOST_TEST(contains(what, "f cannot be read at byte 5000: Input/output error"));
  BOOST_TEST(at.usual.reads == 0);
  BOOST_TEST(at.said.empty());
}

BOOST_AUTO_TEST_CASE(a_file_that_ends_early_is_an_error) {
  const TemporaryDirectory folder;
  write_file(folder / "f", random_bytes(8, 10'000));
  const auto file =
      direct_opener(open_posix_file, [](const std::string&) {})(folder / "f", FileMode::read);
  const auto error = [&](std::uint64_t begin, std::size_t count) {
    return message_of<Error>([&] { read_range(*file, begin, count); });
  };
  BOOST_TEST(contains(error(0, 10'001), "ends at byte 10000"));
  BOOST_TEST(contains(error(10'000, 1), "ends at byte 10000"));
  BOOST_TEST(contains(error(50'000, 1), "ends at byte 50000"));
  std::filesystem::resize_file(folder / "f", 5000);
  BOOST_TEST(contains(error(100, 8000), "ends at byte 5000"));
}

BOOST_AUTO_TEST_CASE(only_files_for_reading_are_opened_so) {
  const TemporaryDirectory folder;
  const FileOpener open = direct_opener(open_posix_file, never_refused);
  const auto file = open(folder / "f", FileMode::create);
  BOOST_TEST(dynamic_cast<DirectFile*>(file.get()) == nullptr);
  file->write_at(3, bytes_of("abc"));
  BOOST_TEST(read_file(folder / "f") == std::string("\0\0\0abc", 6));
}

// Slots of several blocks each, written in any order, of which the ends of the last blocks are
// lost.
BOOST_AUTO_TEST_CASE(slots_hold_what_was_written_last) {
  constexpr std::size_t alignment = 4096, slots = 7, slot_bytes = 3 * MiB;
  for (const std::size_t most : {alignment, std::size_t{70'001}, std::size_t{1} << 30}) {
    OnDisk at;
    FakeDisk disk{"", alignment, most};
    const auto file = at.open_to_write(disk);
    std::vector<std::string> held(slots);
    std::mt19937_64 random(most);
    for (int round = 0; round < 60; ++round) {
      const std::size_t slot = random() % slots;
      held[slot] = random_bytes(random(), 1 + random() % (most > MiB ? slot_bytes : MiB / 8));
      file->write_at(slot * slot_bytes, bytes_of(held[slot]));
      const std::size_t other = random() % slots;
      const std::size_t begin = held[other].empty() ? 0 : random() % held[other].size();
      BOOST_TEST((read_range(*file, other * slot_bytes + begin, held[other].size() - begin) ==
                  held[other].substr(begin)));
    }
    BOOST_TEST(at.usual.reads + at.usual.writes == 0);
    BOOST_TEST(at.said.empty());
  }
}

BOOST_AUTO_TEST_CASE(direct_writes_that_fail_are_refused_or_said) {
  OnDisk at;
  FakeDisk disk{std::string(8192, 'x')};
  const auto file = at.open_to_write(disk);
  BOOST_CHECK_THROW(file->write_at(3, bytes_of("abc")), std::logic_error);
  disk.failure = ENOSPC;
  BOOST_TEST(contains(message_of<Error>([&] { file->write_at(4096, bytes_of("abc")); }),
                      "f cannot be written at byte 4096: No space left on device"));
  BOOST_TEST(at.said.empty());
  disk.failure = EINVAL;
  file->write_at(4096, bytes_of("abc"));
  BOOST_TEST(at.said.size() == 1u);
  BOOST_TEST(at.usual.writes == 1);
  BOOST_TEST(read_range(*file, 4095, 4) == "xabc");
}

BOOST_AUTO_TEST_CASE(what_was_written_directly_is_not_refused_later) {
  OnDisk at;
  FakeDisk disk;
  const auto file = at.open_to_write(disk);
  file->write_at(0, bytes_of("abc"));
  disk.failure = EINVAL;
  BOOST_TEST(contains(message_of<Error>([&] { file->write_at(4096, bytes_of("abc")); }),
                      "f cannot be written at byte 4096: Invalid argument"));
  BOOST_TEST(contains(message_of<Error>([&] { read_range(*file, 0, 3); }),
                      "f cannot be read at byte 0: Invalid argument"));
  BOOST_TEST(at.usual.writes + at.usual.reads == 0);
}

BOOST_AUTO_TEST_CASE(blocks_are_written_so_where_the_file_system_allows) {
  const TemporaryDirectory folder;
  int refused = 0;
  const auto open = direct_block_opener([&](const std::string&) { ++refused; });
  const std::string data = random_bytes(3, 5 * MiB + 100);
  {
    const auto file = open(folder / "f", FileMode::create);
    file->write_at(2 * direct_block, bytes_of(data));
    file->write_at(0, bytes_of("abc"));
    BOOST_TEST((read_range(*file, 2 * direct_block, data.size()) == data));
    file->sync();
  }
  BOOST_TEST(refused <= 1);
  const std::string all = read_file(folder / "f");
  BOOST_TEST(all.substr(0, 3) == "abc");
  BOOST_TEST((all.substr(2 * direct_block, data.size()) == data));
  const auto kept = open(folder / "f", FileMode::update);
  BOOST_TEST((read_range(*kept, 2 * direct_block + 7, data.size() - 7) == data.substr(7)));
}

BOOST_AUTO_TEST_CASE(tensors_are_read_so_in_any_block) {
  const TemporaryDirectory folder;
  std::mt19937_64 random(9);
  for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
    for (const DType dtype : {DType::f16, DType::f64}) {
      const TensorDesc desc{"q", dtype, layout, 4, 2, 3001, 3, 24};
      const std::string data = random_elements(random, dtype, desc.elements());
      for (const char* name : {"q.npy", "q.safetensors"}) {
        const auto sink = create_tensor(folder / name, "q", desc, true);
        const Layout packed = Layout::bshd;
        for (std::int64_t batch = 0; batch < 2; ++batch) {
          const Block all{batch, {0, desc.tokens}, {0, desc.heads}};
          sink->write(all, bytes_of(block_of(desc, data, all, packed, size_of(dtype))));
        }
        sink->commit();
        const auto source = open_tensor(folder / name, "q", layout,
                                        direct_opener(open_posix_file, [](const std::string&) {}));
        for (int round = 0; round < 20; ++round) {
          const Range heads = desc.readable_heads(random_range(random, desc.heads));
          const Block block{static_cast<std::int64_t>(random() % 2),
                            random_range(random, desc.tokens), heads};
          const std::string expected =
              as_stored(dtype, block_of(desc, data, block, layout, size_of(dtype)));
          BOOST_TEST((read_block(*source, block) == expected));
        }
      }
    }
  }
}
