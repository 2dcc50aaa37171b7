// MPI from start to end, errors as exceptions, and files over MPI I/O, in one process.
#define BOOST_TEST_MODULE io_mpi_file
#include <fmt/format.h>
#include <mpi.h>
#include <sys/resource.h>

#include <boost/test/unit_test.hpp>
#include <csignal>
#include <optional>
#include <thread>

#include "io_testing.hpp"
#include "mpi/environment.hpp"
#include "mpi/error.hpp"
#include "mpi/file.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

struct Mpi {
  void setup() {
    auto& suite = boost::unit_test::framework::master_test_suite();
    environment.emplace(suite.argc, suite.argv);
  }
  void teardown() { environment.reset(); }
  static inline std::optional<MpiEnvironment> environment;
};

}  // namespace

BOOST_TEST_GLOBAL_FIXTURE(Mpi);

BOOST_AUTO_TEST_CASE(environment) {
  BOOST_TEST(Mpi::environment->rank() == 0);
  BOOST_TEST(Mpi::environment->size() == 1);
  const std::string version = MpiEnvironment::library_version();
  BOOST_TEST((!version.empty() && !contains(version, "\n")));
}

BOOST_AUTO_TEST_CASE(failing_calls_throw_with_call_reason_and_place) {
  int number = 0;
  const std::string what = message_of<Error>(
      [&] { STREAM_CQSA_MPI(MPI_Send(&number, 1, MPI_INT, 5, 0, MPI_COMM_WORLD)); });
  BOOST_TEST(contains(what, "MPI_Send(&number, 1, MPI_INT, 5, 0, MPI_COMM_WORLD)"));
  BOOST_TEST(contains(what, "MPI_ERR_RANK"));
  BOOST_TEST(contains(what, "at mpi_file_test.cpp:"));
}

BOOST_AUTO_TEST_CASE(bytes_at_offsets) {
  const TemporaryDirectory folder;
  const auto path = folder / "f";
  write_file(path, "what was there before");
  const std::uint64_t far = (std::uint64_t{5} << 30) + 3;
  const std::string text = "some bytes";
  {
    const auto file = open_mpi_file(path, FileMode::create);
    BOOST_TEST(file->size() == 0u);
    file->resize(far + text.size());
    file->write_at(far, bytes_of(text));
    file->write_at(1, bytes_of(text));
    file->sync();
    BOOST_TEST(file->size() == far + text.size());
    std::string back(text.size(), ' ');
    file->read_at(far, std::as_writable_bytes(std::span(back)));
    BOOST_TEST(back == text);
  }
  const auto file = open_mpi_file(path, FileMode::read);
  std::string back(text.size() + 2, ' ');
  file->read_at(0, std::as_writable_bytes(std::span(back)));
  BOOST_TEST((back == '\0' + text + '\0'));
  const auto beyond = [&] { file->read_at(far, std::as_writable_bytes(std::span(back))); };
  BOOST_TEST(contains(message_of<Error>(beyond),
                      fmt::format("ends or cannot be read at byte {}", far + text.size())));
  BOOST_TEST(
      contains(message_of<Error>([&] { file->write_at(0, bytes_of(text)); }), path.string()));
}

BOOST_AUTO_TEST_CASE(tensors_over_mpi) {
  const TemporaryDirectory folder;
  std::mt19937_64 random(1);
  for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
    const TensorDesc desc{"q", DType::f64, layout, 4, 2, 3000, 4, 16};
    const std::string data = random_elements(random, desc.dtype, desc.elements());
    for (const bool staged : {false, true}) {
      const auto sink =
          create_tensor(folder / "q.safetensors", "q", desc, true, open_mpi_file, false, staged);
      std::vector<std::thread> writers;
      for (std::int64_t b = 0; b < 2; ++b) {
        for (const Range heads : {Range{0, 1}, Range{1, 4}}) {
          writers.emplace_back([&, block = Block{b, {0, 3000}, heads}] {
            sink->write(block, bytes_of(block_of(desc, data, block, Layout::bshd, 8)));
          });
        }
      }
      for (auto& writer : writers) writer.join();
      sink->commit();
      BOOST_TEST(read_file(folder / "q.safetensors").ends_with(data));
    }
    const auto source = open_tensor(folder / "q.safetensors", "q", layout, open_mpi_file);
    std::vector<int> wrong(3, 0);
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < wrong.size(); ++i) {
      threads.emplace_back([&, i] {
        std::mt19937_64 own(i);
        for (int n = 0; n < 20; ++n) {
          const Block block{n % 2, random_range(own, 3000), {0, 4}};
          const std::string expected =
              block_of(desc, as_stored(desc.dtype, data), block, layout, 4);
          wrong[i] += read_block(*source, block) != expected;
        }
      });
    }
    for (auto& thread : threads) thread.join();
    for (const int count : wrong) BOOST_TEST(count == 0);
  }
}

BOOST_AUTO_TEST_CASE(files_that_cannot_be_opened) {
  const TemporaryDirectory folder;
  const auto open = [&](const std::string& name, FileMode mode) {
    return message_of<Error>([&] { open_mpi_file(folder / name, mode); });
  };
  BOOST_TEST(contains(open("none", FileMode::read), "cannot be opened"));
  BOOST_TEST(contains(open("no/file", FileMode::create), "cannot be created"));
  std::filesystem::create_directory(folder / "d");
  BOOST_TEST(contains(open("d", FileMode::create), "cannot be created"));
}

BOOST_AUTO_TEST_CASE(a_full_disk_is_an_error) {
  const TemporaryDirectory folder;
  // A limit on the size of files stands in for the disk; past it, writes fail like on a full one.
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  BOOST_REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  rlimit limit = before;
  limit.rlim_cur = 1 << 20;
  const std::string data(3 << 20, 'x');
  std::string resized, at_once, past;
  {
    const auto file = open_mpi_file(folder / "f", FileMode::create);
    BOOST_REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
    resized = message_of<Error>([&] { file->resize(2 << 20); });
    at_once = message_of<Error>([&] { file->write_at(0, bytes_of(data)); });
    past = message_of<Error>([&] { file->write_at(1 << 20, bytes_of(data)); });
    ::setrlimit(RLIMIT_FSIZE, &before);
  }
  BOOST_TEST(contains(resized, "cannot have 2097152 bytes"));
  BOOST_TEST(contains(at_once, "cannot be written at byte 1048576"));
  BOOST_TEST(contains(past, "cannot be written at byte 1048576"));
}
