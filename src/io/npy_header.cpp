#include "io/npy_header.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <optional>
#include <string_view>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr std::string_view magic = "\x93NUMPY";
// numpy itself writes a few hundred bytes at most for arrays without fields.
constexpr std::uint64_t longest_header = 1 << 20;

std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::uint64_t little_endian(std::span<const std::byte> bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = bytes.size(); i-- > 0;) {
    value = value << 8 | std::to_integer<std::uint64_t>(bytes[i]);
  }
  return value;
}

/// The Python literal {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }.
class DictParser {
 public:
  explicit DictParser(std::string_view text) : text_(text) {}

  struct Result {
    std::optional<std::string_view> descr;
    std::optional<bool> fortran_order;
    std::optional<std::vector<std::uint64_t>> shape;
  };

  Result parse() {
    expect('{');
    while (!accept('}')) {
      entry();
      if (!accept(',')) {
        expect('}');
        break;
      }
    }
    skip_space();
    if (at_ != text_.size()) fail("text after the dictionary");
    if (!result_.descr || !result_.fortran_order || !result_.shape) {
      fail("'descr', 'fortran_order' or 'shape' is missing");
    }
    return result_;
  }

 private:
  [[noreturn]] void fail(std::string_view what) const {
    throw InputError(fmt::format("has a malformed .npy header: {} at byte {} of it", what, at_));
  }

  void skip_space() {
    constexpr std::string_view space = " \t\n\r";
    while (at_ < text_.size() && space.find(text_[at_]) != space.npos) ++at_;
  }

  bool accept(char c) {
    skip_space();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!accept(c)) fail(fmt::format("expected '{}'", c));
  }

  void entry() {
    const std::string_view key = string();
    expect(':');
    if (key == "descr" && !result_.descr) {
      skip_space();
      if (at_ < text_.size() && text_[at_] == '[') {
        throw InputError("has a structured dtype; float16, float32 and float64 are supported");
      }
      result_.descr = string();
    } else if (key == "fortran_order" && !result_.fortran_order) {
      result_.fortran_order = boolean();
    } else if (key == "shape" && !result_.shape) {
      result_.shape = tuple();
    } else {
      fail("unknown or repeated key " + in_quotes(key));
    }
  }

  std::string_view string() {
    skip_space();
    if (at_ == text_.size() || (text_[at_] != '\'' && text_[at_] != '"')) fail("expected a string");
    const std::size_t end = text_.find(text_[at_], at_ + 1);
    if (end == text_.npos) fail("unterminated string");
    const std::string_view value = text_.substr(at_ + 1, end - at_ - 1);
    if (value.find('\\') != value.npos) fail("escape in a string");
    at_ = end + 1;
    return value;
  }

  bool boolean() {
    skip_space();
    for (const std::string_view word : {"True", "False"}) {
      if (text_.substr(at_, word.size()) == word) {
        at_ += word.size();
        return word == "True";
      }
    }
    fail("expected True or False");
  }

  std::vector<std::uint64_t> tuple() {
    constexpr std::size_t highest_rank = 64;
    std::vector<std::uint64_t> values;
    expect('(');
    while (!accept(')')) {
      if (values.size() == highest_rank) fail("shape of too many axes");
      values.push_back(integer());
      if (!accept(',')) {
        expect(')');
        break;
      }
    }
    return values;
  }

  std::uint64_t integer() {
    skip_space();
    const std::size_t begin = at_;
    std::uint64_t value = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      const auto digit = static_cast<std::uint64_t>(text_[at_] - '0');
      if (__builtin_mul_overflow(value, std::uint64_t{10}, &value) ||
          __builtin_add_overflow(value, digit, &value)) {
        throw InputError("has a shape with an extent that overflows 64 bits");
      }
    }
    if (at_ == begin) fail("expected a number that is not negative");
    if (at_ < text_.size() && text_[at_] == 'L') ++at_;  // written by Python 2
    return value;
  }

  std::string_view text_;
  std::size_t at_ = 0;
  Result result_;
};

DType parse_descr(std::string_view descr) {
  if (descr == "<f2") return DType::f16;
  if (descr == "<f4") return DType::f32;
  if (descr == "<f8") return DType::f64;
  if (descr == ">f2" || descr == ">f4" || descr == ">f8") {
    throw InputError(fmt::format("is big-endian (dtype {}); save it with .astype('<{}')",
                                 in_quotes(descr), descr.substr(1)));
  }
  throw InputError(fmt::format(
      "has the unsupported dtype {}; float16, float32 and float64 are supported, bfloat16 in "
      ".safetensors",
      in_quotes(descr)));
}

std::string_view descr_of(DType dtype) {
  switch (dtype) {
    case DType::f16:
      return "<f2";
    case DType::f32:
      return "<f4";
    case DType::f64:
      return "<f8";
    case DType::bf16:
      break;
  }
  throw InputError(
      ".npy files have no bfloat16; name a .safetensors file, or use --output-dtype f32");
}

}  // namespace

std::uint64_t npy_header_bytes(std::span<const std::byte> start, std::uint64_t file_size) {
  if (!as_text(start).starts_with(magic)) throw InputError("is not a .npy file");
  if (start.size() < npy_prefix_bytes) throw InputError("is truncated: its .npy header is cut");
  const int version = std::to_integer<int>(start[6]);
  if (version < 1 || version > 3) {
    throw InputError(fmt::format("has the unknown .npy version {}; 1 to 3 are supported", version));
  }
  const std::uint64_t prefix = version == 1 ? 10 : 12;
  const std::uint64_t length = little_endian(start.subspan(8, prefix - 8));
  if (length > longest_header) {
    throw InputError(fmt::format("has a .npy header that is too large: {} bytes, {} are allowed",
                                 length, longest_header));
  }
  if (prefix + length > file_size) throw InputError("is truncated: its .npy header is cut");
  return prefix + length;
}

StoredTensor parse_npy_header(std::span<const std::byte> start, std::uint64_t file_size) {
  const auto prefix = start.first(std::min<std::size_t>(start.size(), npy_prefix_bytes));
  const std::uint64_t offset = npy_header_bytes(prefix, file_size);
  if (start.size() < offset) throw InputError("is truncated: its .npy header is cut");
  const std::size_t text_begin = start[6] == std::byte{1} ? 10 : 12;
  const auto header = DictParser(as_text(start.subspan(text_begin, offset - text_begin))).parse();

  StoredTensor tensor;
  tensor.dtype = parse_descr(*header.descr);
  if (*header.fortran_order) {
    throw InputError("is in Fortran order; save it with np.ascontiguousarray");
  }
  tensor.shape = usable_shape(*header.shape, tensor.dtype);
  tensor.offset = offset;
  const std::uint64_t bytes =
      *checked_bytes(*header.shape, static_cast<std::uint64_t>(size_of(tensor.dtype)));
  if (bytes > file_size - offset) {
    throw InputError(fmt::format("is truncated: {} bytes of data for shape [{}], {} are needed",
                                 file_size - offset, fmt::join(tensor.shape, ", "), bytes));
  }
  return tensor;
}

std::string format_npy_header(DType dtype, std::span<const std::int64_t> shape) {
  constexpr std::size_t prefix = 10;
  constexpr std::size_t alignment = 64;
  std::string text = fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}",
                                 descr_of(dtype), fmt::join(shape, ", "));
  text.append(alignment - 1 - (prefix + text.size()) % alignment, ' ');
  text += '\n';
  std::string header(magic);
  header +=
      {'\x01', '\x00', static_cast<char>(text.size() & 0xff), static_cast<char>(text.size() >> 8)};
  return header + text;
}

}  // namespace stream_cqsa
