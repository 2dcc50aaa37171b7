// Inputs that cannot be read and outputs that cannot be written: one-line errors, and no debris.
#define BOOST_TEST_MODULE io_tensor_error
#include <sys/resource.h>
#include <sys/stat.h>

#include <boost/test/unit_test.hpp>
#include <csignal>

#include "io/npy_header.hpp"
#include "io_testing.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

TensorDesc small_desc() { return {"o", DType::f32, Layout::bshd, 3, 1, 6, 4, 8}; }

std::string open_error(const std::filesystem::path& path, const std::string& tensor = "q") {
  return message_of<InputError>([&] { open_tensor(path, tensor, Layout::bshd); });
}

std::string create_error(const std::filesystem::path& path, const TensorDesc& desc) {
  return message_of<InputError>([&] { create_tensor(path, "o", desc, false); });
}

}  // namespace

BOOST_AUTO_TEST_CASE(files_that_cannot_be_opened) {
  const TemporaryDirectory folder;
  BOOST_TEST(contains(open_error(folder / "none.npy"), "No such file"));
  BOOST_TEST(contains(open_error(folder / "q.bin"), "unknown file format"));
  std::filesystem::create_directory(folder / "d.npy");
  BOOST_TEST(contains(open_error(folder / "d.npy"), "not a regular file"));
  BOOST_REQUIRE(::mkfifo((folder / "pipe.npy").c_str(), 0600) == 0);
  BOOST_TEST(contains(open_error(folder / "pipe.npy"), "not a regular file"));
  write_file(folder / "empty.npy", "");
  BOOST_TEST(contains(open_error(folder / "empty.npy"), "not a .npy file"));
  write_file(folder / "empty.safetensors", "");
  BOOST_TEST(contains(open_error(folder / "empty.safetensors"), "truncated"));
  const std::vector<std::int64_t> shape = {3, 4};
  write_file(folder / "cut.npy", format_npy_header(DType::f32, shape) + std::string(47, 'x'));
  const std::string cut = open_error(folder / "cut.npy");
  BOOST_TEST(contains(cut, "truncated"));
  BOOST_TEST(cut.starts_with((folder / "cut.npy").string()));
  write_file(
      folder / "q.safetensors",
      safetensors_bytes(R"({"a":{"dtype":"F16","shape":[1,1],"data_offsets":[0,2]}})", "xx"));
  BOOST_TEST(contains(open_error(folder / "q.safetensors", "q|query"), "it has 'a'"));
}

BOOST_AUTO_TEST_CASE(a_file_that_shrinks_while_it_is_read_is_an_error) {
  const TemporaryDirectory folder;
  create_tensor(folder / "q.npy", "", small_desc(), false)->commit();
  const auto source = open_tensor(folder / "q.npy", "", Layout::bshd);
  std::filesystem::resize_file(folder / "q.npy", 500);
  const std::string what = message_of<Error>([&] { read_block(*source, {0, {0, 6}, {0, 4}}); });
  BOOST_TEST(contains(what, "ends at byte 500"));
}

BOOST_AUTO_TEST_CASE(outputs_that_cannot_be_created) {
  const TemporaryDirectory folder;
  TensorDesc bf16 = small_desc();
  bf16.dtype = DType::bf16;
  const std::string what = create_error(folder / "o.npy", bf16);
  BOOST_TEST((contains(what, ".safetensors") && contains(what, "--output-dtype f32")));
  BOOST_TEST(contains(create_error(folder / "o.txt", small_desc()), "unknown file format"));
  BOOST_TEST(contains(create_error(folder / "no/o.npy", small_desc()), "No such file"));
  BOOST_TEST(folder.empty());
  write_file(folder / "o.npy", "precious");
  BOOST_TEST(contains(create_error(folder / "o.npy", small_desc()), "exists"));
  BOOST_TEST(read_file(folder / "o.npy") == "precious");
  std::filesystem::create_directory(folder / "d.npy");
  BOOST_TEST(contains(
      message_of<InputError>([&] { create_tensor(folder / "d.npy", "", small_desc(), true); }),
      "not a regular file"));
  TensorDesc empty = small_desc();
  empty.tokens = 0;
  BOOST_TEST(contains(create_error(folder / "e.npy", empty), "at least 1"));
}

BOOST_AUTO_TEST_CASE(sets_of_tensors_that_cannot_be_created) {
  const TemporaryDirectory folder;
  const auto error = [&](const std::string& name, const std::vector<TensorDesc>& descs) {
    return message_of<InputError>([&] { create_tensors(folder / name, descs, false); });
  };
  TensorDesc other = small_desc();
  other.name = "p";
  BOOST_TEST(contains(error("o.npy", {small_desc(), other}), "holds one tensor"));
  BOOST_TEST(contains(error("o.txt", {small_desc(), other}), "unknown file format"));
  BOOST_TEST(contains(error("o.safetensors", {other, small_desc(), other}), "two tensors 'p'"));
  TensorDesc large = small_desc();
  large.dtype = other.dtype = DType::f64;
  large.tokens = other.tokens = std::int64_t{1} << 54;  // of 32 elements
  BOOST_TEST(contains(error("o.safetensors", {large, other}), "overflows 64 bits"));
  other.tokens = 0;
  BOOST_TEST(contains(error("o.safetensors", {small_desc(), other}), "at least 1"));
  BOOST_TEST(folder.empty());
  write_file(folder / "o.safetensors", "precious");
  BOOST_TEST(contains(error("o.safetensors", {small_desc()}), "exists"));
  BOOST_TEST(read_file(folder / "o.safetensors") == "precious");
}

BOOST_AUTO_TEST_CASE(one_sink_at_a_time_for_an_output) {
  const TemporaryDirectory folder;
  const auto path = folder / "o.npy";
  const auto another = [&] {
    return message_of<InputError>([&] { create_tensor(path, "", small_desc(), true); });
  };
  const std::string refused = "o.npy.partial is being written by another run";
  const std::string data(768, 'x');
  {
    const auto first = create_tensor(path, "", small_desc(), true);
    first->write({0, {0, 6}, {0, 4}}, bytes_of(data));
    BOOST_TEST(contains(another(), refused));
    BOOST_TEST(contains(another(), refused));  // the one refused did not remove it
    BOOST_TEST(read_file(folder / "o.npy.partial").ends_with(data));
  }
  BOOST_TEST(folder.empty());
  const auto first = create_tensor(path, "", small_desc(), true);
  BOOST_TEST(contains(another(), refused));
  first->write({0, {0, 6}, {0, 4}}, bytes_of(data));
  first->commit();
  BOOST_TEST(another() == "nothing thrown");
  create_tensor(path, "", lse_desc(1, 1, 1), true)->commit();
  BOOST_TEST(read_file(path).size() == 128u + 4u);
}

BOOST_AUTO_TEST_CASE(what_a_partial_name_links_to_stays) {
  const TemporaryDirectory folder;
  write_file(folder / "q.npy", "precious");
  for (const std::string target : {"q.npy", "none.npy", "o.npy.partial"}) {
    std::filesystem::create_symlink(folder / target, folder / "o.npy.partial");
    BOOST_TEST(contains(create_error(folder / "o.npy", small_desc()), "is a symbolic link"));
    BOOST_TEST(read_file(folder / "q.npy") == "precious");
    BOOST_TEST(!std::filesystem::exists(folder / "none.npy"));
    BOOST_TEST(std::filesystem::remove(folder / "o.npy.partial"));
  }
  BOOST_REQUIRE(::mkfifo((folder / "o.npy.partial").c_str(), 0600) == 0);
  BOOST_TEST(contains(create_error(folder / "o.npy", small_desc()), "not a regular file"));
}

BOOST_AUTO_TEST_CASE(an_opener_that_fails_leaves_nothing) {
  const TemporaryDirectory folder;
  const FileOpener failing = [](const std::filesystem::path&, FileMode) -> std::unique_ptr<File> {
    throw Error("no");
  };
  BOOST_CHECK_THROW(create_tensor(folder / "o.npy", "", small_desc(), false, failing), InputError);
  BOOST_TEST(folder.empty());
}

BOOST_AUTO_TEST_CASE(names_with_control_characters_keep_messages_on_one_line) {
  const TemporaryDirectory folder;
  BOOST_TEST(contains(open_error(folder / "a\nb.npy"), "a\\x0ab.npy cannot be opened"));
  write_file(folder / "a\nb.npy", "");
  BOOST_TEST(contains(open_error(folder / "a\nb.npy"), "a\\x0ab.npy is not"));
  BOOST_TEST(contains(create_error(folder / "a\nb.npy", small_desc()), "a\\x0ab.npy exists"));
  BOOST_TEST(contains(create_error(folder / "no\n/o.npy", small_desc()), "no\\x0a/o.npy"));
}

BOOST_AUTO_TEST_CASE(blocks_outside_of_the_tensor_are_errors) {
  const TemporaryDirectory folder;
  const auto sink = create_tensor(folder / "o.npy", "", small_desc(), false);
  std::string buffer(768, 'x');
  const std::vector<Block> outside = {{1, {0, 6}, {0, 4}},
                                      {0, {1, 7}, {0, 4}},
                                      {0, {0, 6}, {-1, 3}},
                                      {0, {3, 2}, {0, 4}},
                                      {0, {0, 5}, {0, 4}}};
  for (const Block& block : outside) {
    BOOST_CHECK_THROW(sink->write(block, bytes_of(buffer)), Error);
  }
  sink->commit();
  const auto source = open_tensor(folder / "o.npy", "", Layout::bshd);
  const auto into = std::as_writable_bytes(std::span(buffer));
  for (const Block& block : outside) BOOST_CHECK_THROW(source->read(block, into), Error);
  // Heads of a bshd file are not read apart.
  BOOST_CHECK_THROW(source->read({0, {0, 6}, {0, 2}}, into.first(384)), Error);
}

BOOST_AUTO_TEST_CASE(a_full_disk_is_an_error_and_leaves_nothing) {
  const TemporaryDirectory folder;
  // A limit on the size of files stands in for the disk; past it, writes fail like on a full one.
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  BOOST_REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  rlimit limit = before;
  limit.rlim_cur = 1 << 20;
  BOOST_REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  TensorDesc large = small_desc();
  large.tokens = 1 << 20;
  const std::string created =
      message_of<Error>([&] { create_tensor(folder / "o.npy", "", large, false); });
  std::string written;
  {
    const auto file = open_posix_file(folder / "f", FileMode::create);
    const std::string data(3 << 20, 'x');
    written = message_of<Error>([&] { file->write_at(0, bytes_of(data)); });
  }
  ::setrlimit(RLIMIT_FSIZE, &before);
  BOOST_TEST(contains(created, "File too large"));
  BOOST_TEST(contains(written, "cannot be written at byte 1048576: File too large"));
  std::filesystem::remove(folder / "f");
  BOOST_TEST(folder.empty());
}
