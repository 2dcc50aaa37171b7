// Headers of .npy and .safetensors files: the formats' own examples, and hostile bytes.
#define BOOST_TEST_MODULE io_header
#include <fmt/format.h>

#include <boost/test/unit_test.hpp>

#include "io/npy_header.hpp"
#include "io/safetensors_header.hpp"
#include "io_testing.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

StoredTensor parse_npy(const std::string& bytes) {
  return parse_npy_header(bytes_of(bytes), bytes.size());
}

std::string npy_error(const std::string& bytes) {
  return message_of<InputError>([&] { parse_npy(bytes); });
}

NamedTensor parse_safetensors(const std::string& bytes, const std::string& names) {
  return find_tensor(parse_safetensors_header(bytes_of(bytes), bytes.size()), names);
}

std::string safetensors_error(const std::string& header, std::size_t data_bytes,
                              const std::string& names = "q") {
  const std::string bytes = safetensors_bytes(header, std::string(data_bytes, 'x'));
  return message_of<InputError>([&] { parse_safetensors(bytes, names); });
}

/// What np.save writes for np.zeros((3, 4), '<f4').
std::string numpy_3_4() {
  return std::string("\x93NUMPY\x01\x00v\x00", 10) +
         "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }" + std::string(58, ' ') +
         "\n" + std::string(48, '\0');
}

std::string dictionary(const std::string& descr, const std::string& shape) {
  return fmt::format("{{'descr': {}, 'fortran_order': False, 'shape': {}, }}\n", descr, shape);
}

const std::vector<std::int64_t> shape_3_4 = {3, 4};

}  // namespace

BOOST_AUTO_TEST_CASE(npy_as_numpy_writes_it) {
  const StoredTensor tensor = parse_npy(numpy_3_4());
  BOOST_TEST((tensor.dtype == DType::f32));
  BOOST_TEST(tensor.shape == shape_3_4, boost::test_tools::per_element());
  BOOST_TEST(tensor.offset == 128u);
  BOOST_TEST(format_npy_header(DType::f32, shape_3_4) == numpy_3_4().substr(0, 128));
}

BOOST_AUTO_TEST_CASE(npy_versions_dtypes_and_spellings) {
  for (const int version : {1, 2, 3}) {
    const auto tensor =
        parse_npy(npy_bytes(version, dictionary("'<f8'", "(1, 2, 3)"), std::string(48, 'x')));
    BOOST_TEST((tensor.dtype == DType::f64));
    BOOST_TEST(tensor.shape.size() == 3u);
  }
  const auto python2 =
      parse_npy(npy_bytes(1, "{\"shape\":(2L,1L,5L,1L),\"fortran_order\":False,\"descr\":\"<f2\"}",
                          std::string(20, 'x')));
  BOOST_TEST((python2.dtype == DType::f16));
  BOOST_TEST(python2.shape[2] == 5);
}

BOOST_AUTO_TEST_CASE(npy_headers_written_are_aligned_and_read_back) {
  for (std::int64_t extent = 1; extent > 0 && extent < std::int64_t{1} << 40; extent *= 7) {
    const std::vector<std::int64_t> shape = {2, extent, 3, 5};
    const std::string header = format_npy_header(DType::f16, shape);
    BOOST_TEST(header.size() % 64 == 0u);
    const auto size = header.size() + static_cast<std::uint64_t>(60 * extent);
    BOOST_TEST(parse_npy_header(bytes_of(header), size).shape == shape,
               boost::test_tools::per_element());
  }
}

BOOST_AUTO_TEST_CASE(npy_bad_input) {
  const auto error = [](const std::string& descr, const std::string& shape, std::size_t data = 48) {
    return npy_error(npy_bytes(1, dictionary(descr, shape), std::string(data, '\0')));
  };
  BOOST_TEST(contains(error("'>f4'", "(3, 4)"), "big-endian"));
  BOOST_TEST(contains(error("'|O'", "(3, 4)"), "unsupported dtype '|O'"));
  BOOST_TEST(contains(error("'<i4'", "(3, 4)"), "unsupported dtype '<i4'"));
  BOOST_TEST(contains(error("[('a', '<f4')]", "(3, 4)"), "structured dtype"));
  BOOST_TEST(contains(error("'<f4'", "()"), "rank 0"));
  BOOST_TEST(contains(error("'<f4'", "(12,)"), "rank 1"));
  BOOST_TEST(contains(error("'<f4'", "(1, 1, 1, 3, 4)"), "rank 5"));
  BOOST_TEST(contains(error("'<f4'", "(0, 4)"), "is empty"));
  BOOST_TEST(contains(error("'<f4'", "(3, -4)"), "not negative"));
  BOOST_TEST(contains(error("'<f4'", "(3, 18446744073709551616)"), "overflows 64 bits"));
  BOOST_TEST(contains(error("'<f4'", "(4294967296, 4294967296)"), "overflows 64 bits"));
  BOOST_TEST(contains(error("'<f8'", "(1152921504606846976, 1)"), "overflows 64 bits"));
  BOOST_TEST(contains(error("'<f4'", "(3, 4)", 47), "truncated: 47 bytes"));
  BOOST_TEST(contains(error("'<f4'", "(9000000000, 4)"), "truncated"));
  BOOST_TEST(contains(error("'\n'", "(3, 4)"), "'\\x0a'"));
  const auto with = [](const std::string& header) { return npy_error(npy_bytes(1, header, {})); };
  BOOST_TEST(contains(with("{'descr': '<f4', 'fortran_order': True, 'shape': (3, 4)}"), "Fortran"));
  BOOST_TEST(contains(with("{'descr': '<f4', 'shape': (3, 4)}"), "missing"));
  BOOST_TEST(contains(with("{'descr': '<f4', 'descr': '<f4'}"), "repeated"));
  BOOST_TEST(contains(with("{'descr': '<f4"), "unterminated"));
  BOOST_TEST(contains(with("  "), "expected '{'"));
  BOOST_TEST(contains(with(dictionary("'<f4'", fmt::format("({})", std::string(60000, '1')))),
                      "overflows"));
}

BOOST_AUTO_TEST_CASE(npy_cut_anywhere_is_an_input_error) {
  const std::string whole = numpy_3_4();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    const std::string what = npy_error(whole.substr(0, size));
    BOOST_TEST((contains(what, "truncated") || contains(what, "not a .npy file")),
               "cut at " << size << ": " << what);
  }
  BOOST_TEST(contains(npy_error(npy_bytes(4, dictionary("'<f4'", "(3, 4)"), {})), "version 4"));
  const std::string huge = std::string("\x93NUMPY\x02\x00\xff\xff\xff\xff", 12);
  BOOST_TEST(contains(npy_error(huge), "too large"));
}

BOOST_AUTO_TEST_CASE(safetensors_reads_what_the_format_describes) {
  const std::string bytes =
      safetensors_bytes(R"({"__metadata__":{"format":"pt"},)"
                        R"("b":{"dtype":"I8","shape":[],"data_offsets":[24,25]},)"
                        R"("q":{"data_offsets":[0,24],"shape":[2,3,2],"dtype":"BF16"}}   )",
                        std::string(25, 'x'));
  const NamedTensor found = parse_safetensors(bytes, "query|q|b");
  BOOST_TEST(found.name == "q");
  BOOST_TEST((found.tensor.dtype == DType::bf16));
  BOOST_TEST(found.tensor.offset == bytes.size() - 25);
  BOOST_TEST(found.tensor.shape.size() == 3u);
}

BOOST_AUTO_TEST_CASE(safetensors_headers_written_read_back) {
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    const std::string name = "o\"\\\n\xc3\xa9";
    const std::string header = format_safetensors_header({{name, dtype, shape_3_4}});
    BOOST_TEST(header.size() % 8 == 0u);
    const auto data = static_cast<std::size_t>(12 * size_of(dtype));
    const NamedTensor found = parse_safetensors(header + std::string(data, 'x'), name);
    BOOST_TEST((found.tensor.dtype == dtype));
    BOOST_TEST(found.tensor.shape == shape_3_4, boost::test_tools::per_element());
    BOOST_TEST(found.tensor.offset == header.size());
  }
}

BOOST_AUTO_TEST_CASE(safetensors_headers_of_several_tensors_read_back) {
  const std::string header =
      format_safetensors_header({{"b", DType::f16, {3, 5}}, {"a", DType::f32, {2, 1, 3}}});
  BOOST_TEST(header.size() % 8 == 0u);
  const std::string file = header + std::string(30 + 24, 'x');
  const NamedTensor first = parse_safetensors(file, "b"), second = parse_safetensors(file, "a");
  const std::vector<std::int64_t> shape_3_5 = {3, 5}, shape_2_1_3 = {2, 1, 3};
  BOOST_TEST(first.tensor.offset == header.size());
  BOOST_TEST(first.tensor.shape == shape_3_5, boost::test_tools::per_element());
  BOOST_TEST(second.tensor.offset == header.size() + 30);
  BOOST_TEST(second.tensor.shape == shape_2_1_3, boost::test_tools::per_element());
  BOOST_TEST((second.tensor.dtype == DType::f32));
}

BOOST_AUTO_TEST_CASE(safetensors_bad_lengths) {
  const auto error = [](const std::string& bytes) {
    return message_of<InputError>([&] { parse_safetensors(bytes, "q"); });
  };
  BOOST_TEST(contains(error(""), "truncated"));
  BOOST_TEST(contains(error("1234567"), "truncated"));
  BOOST_TEST(contains(error(little_endian(100'000'001, 8)), "too large"));
  BOOST_TEST(contains(error(little_endian(~std::uint64_t{0}, 8)), "too large"));
  BOOST_TEST(contains(error(little_endian(3, 8) + "{}"), "truncated"));
  BOOST_TEST(contains(error(little_endian(0, 8)), "not JSON"));
}

BOOST_AUTO_TEST_CASE(safetensors_bad_json) {
  const auto error = [](const std::string& header) { return safetensors_error(header, 0); };
  BOOST_TEST(contains(error("not json"), "not JSON"));
  BOOST_TEST(contains(error("{} {}"), "not JSON"));
  BOOST_TEST(contains(error("\xef\xbb\xbf{}"), "starts with '{'"));
  BOOST_TEST(contains(error(" {}"), "starts with '{'"));
  BOOST_TEST(contains(error("{\"\xff\":1}"), "not JSON"));
  BOOST_TEST(contains(error("[]"), "malformed"));
  BOOST_TEST(contains(error("7"), "malformed"));
  BOOST_TEST(contains(error("null"), "malformed"));
  BOOST_TEST(contains(error("{\"q\":[1]}"), "malformed"));
  BOOST_TEST(contains(error("{\"q\":{}}"), "without dtype"));
  BOOST_TEST(contains(error("{}"), "it has none"));
  BOOST_TEST(contains(error(std::string(1'000'000, '[')), "malformed"));
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"q\":";
  BOOST_TEST(contains(error(objects), "malformed"));
  BOOST_TEST(contains(error(R"({"q":{"dtype":"F16","shape":[[2,2]]}})"), "malformed"));
  BOOST_TEST(contains(error(R"({"q":{"dtype":"F16","dtype":"F16"}})"), "more than once"));
  BOOST_TEST(contains(error(R"({"q":{"bytes":3}})"), "malformed"));
}

BOOST_AUTO_TEST_CASE(safetensors_bad_tensors) {
  const auto q = [](const std::string& shape, const std::string& offsets,
                    const std::string& dtype = "F16") {
    return fmt::format(R"({{"q":{{"dtype":"{}","shape":{},"data_offsets":{}}}}})", dtype, shape,
                       offsets);
  };
  BOOST_TEST(contains(safetensors_error(q("[2,2]", "[0,8]"), 7), "out of bounds"));
  BOOST_TEST(contains(safetensors_error(q("[2,2]", "[8,0]"), 8), "ends before it begins"));
  BOOST_TEST(contains(safetensors_error(q("[2,2]", "[0,6]"), 6), "takes 8 bytes"));
  BOOST_TEST(contains(safetensors_error(q("[2,2]", "[0,8]"), 9), "after the 8"));
  BOOST_TEST(contains(safetensors_error(q("[2,2]", "[1,9]"), 9), "hole"));
  BOOST_TEST(contains(safetensors_error(q("[2,2]", "[0]"), 8), "not a pair"));
  BOOST_TEST(contains(safetensors_error(q("[2,2]", "[0,8,8]"), 8), "a number"));
  BOOST_TEST(contains(safetensors_error(q("[2,-2]", "[0,8]"), 8), "negative"));
  BOOST_TEST(contains(safetensors_error(q("[2,2.0]", "[0,8]"), 8), "not an integer"));
  BOOST_TEST(contains(safetensors_error(q("[2,2]", "[0,18446744073709551616]"), 8), "64 bits"));
  BOOST_TEST(contains(safetensors_error(q("[2,2]", "[18446744073709551608,0]"), 8), "ends before"));
  BOOST_TEST(contains(safetensors_error(q("[4294967296,4294967296]", "[0,0]"), 0), "64 bits"));
  BOOST_TEST(contains(safetensors_error(q("[8]", "[0,16]"), 16), "rank 1"));
  BOOST_TEST(contains(safetensors_error(q("[0,8]", "[0,0]"), 0), "is empty"));
  BOOST_TEST(contains(safetensors_error(q("[2,2]", "[0,8]", "I16"), 8), "unsupported dtype 'I16'"));
  BOOST_TEST(contains(safetensors_error(q("[2,2]", "[0,8]", "X"), 8), "unsupported dtype 'X'"));
  BOOST_TEST(contains(safetensors_error(q("[2,2]", "[0,8]"), 8, "k|key"), "it has 'q'"));

  const std::string a = R"("a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]})";
  const std::string b = R"("b":{"dtype":"F16","shape":[2,2],"data_offsets":[4,12]})";
  BOOST_TEST(contains(safetensors_error(fmt::format("{{{},{}}}", a, b), 12), "overlaps"));
  const std::string again = R"("a":{"dtype":"F16","shape":[2,2],"data_offsets":[8,16]})";
  BOOST_TEST(contains(safetensors_error(fmt::format("{{{},{}}}", a, again), 16), "more than once"));
}

BOOST_AUTO_TEST_CASE(damaged_headers_never_do_worse_than_an_input_error) {
  const std::uint64_t seed = 20260420;
  std::mt19937_64 random(seed);
  const std::string npy = numpy_3_4();
  const std::string json = format_safetensors_header({{"q", DType::f16, shape_3_4}});
  for (int i = 0; i < 20'000; ++i) {
    for (const bool is_npy : {true, false}) {
      std::string bytes = is_npy ? npy : json + std::string(24, 'x');
      for (std::uint64_t n = random() % 4 + 1; n > 0; --n) {
        bytes[random() % 128 % bytes.size()] = static_cast<char>(random());
      }
      bytes.resize(random() % 8 == 0 ? random() % bytes.size() : bytes.size());
      try {
        const StoredTensor tensor =
            is_npy ? parse_npy(bytes) : parse_safetensors(bytes, "q").tensor;
        TensorDesc desc = describe(tensor, Layout::bshd, "q");
        BOOST_TEST(tensor.offset + static_cast<std::uint64_t>(desc.bytes()) <= bytes.size(),
                   "seed " << seed << ", round " << i);
      } catch (const InputError& error) {
        const std::string text = error.what();
        BOOST_TEST(!contains(text, "\n"), "seed " << seed << ", round " << i << ": " << text);
      }
    }
  }
}
