#include "io/safetensors_json.hpp"

#include <fmt/format.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

/// nlohmann's event interface: nothing is kept but the entries, and nesting stops at the format's
/// depth, so that a hostile header cannot make a tree many times its size.
class EntryReader {
 public:
  std::vector<SafetensorsEntry> take() { return std::move(entries_); }

  bool start_object(std::size_t) {
    if (level_ == Level::outside) {
      level_ = Level::names;
    } else if (level_ == Level::names && key_ == "__metadata__") {
      level_ = Level::metadata;
    } else if (level_ == Level::names) {
      level_ = Level::fields;
      seen_ = 0;
      entries_.push_back({key_, {}, {}, 0, 0});
    } else {
      fail("an object");
    }
    return true;
  }

  bool key(std::string& name) {
    key_ = std::move(name);
    return true;
  }

  bool end_object() {
    if (level_ == Level::fields && seen_ != all_fields) {
      throw InputError(fmt::format("lists the tensor {} without dtype, shape or data_offsets",
                                   in_quotes(entries_.back().name)));
    }
    level_ = level_ == Level::names ? Level::outside : Level::names;
    return true;
  }

  bool start_array(std::size_t) {
    if (level_ == Level::fields && key_ == "shape") {
      see(shape_field);
      level_ = Level::shape;
    } else if (level_ == Level::fields && key_ == "data_offsets") {
      see(offsets_field);
      level_ = Level::offsets;
      offsets_ = 0;
    } else {
      fail("an array");
    }
    return true;
  }

  bool end_array() {
    if (level_ == Level::offsets && offsets_ != 2) fail("a byte range that is not a pair");
    level_ = Level::fields;
    return true;
  }

  bool number_unsigned(std::uint64_t value) {
    if (level_ == Level::shape) {
      constexpr std::size_t highest_rank = 64;
      auto& shape = entries_.back().shape;
      if (shape.size() == highest_rank) fail("a shape of too many axes");
      shape.push_back(value);
    } else if (level_ == Level::offsets && offsets_ < 2) {
      (offsets_ == 0 ? entries_.back().begin : entries_.back().end) = value;
      ++offsets_;
    } else {
      fail("a number");
    }
    return true;
  }

  bool string(std::string& value) {
    constexpr std::size_t longest_dtype = 16;
    if (level_ == Level::metadata) return true;
    if (level_ != Level::fields || key_ != "dtype" || value.size() > longest_dtype) {
      fail("a string");
    }
    see(dtype_field);
    entries_.back().dtype = std::move(value);
    return true;
  }

  // An integer of more than 64 bits comes as a floating-point number.
  bool number_float(double, const std::string&) {
    fail("a number that is not an integer or overflows 64 bits");
  }
  bool number_integer(std::int64_t) { fail("a negative number"); }
  bool null() { fail("null"); }
  bool boolean(bool) { fail("true or false"); }
  bool binary(nlohmann::json::binary_t&) { fail("binary data"); }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) {
    throw InputError(
        fmt::format("has a .safetensors header that is not JSON, at byte {} of it", position));
  }

 private:
  enum class Level { outside, names, metadata, fields, shape, offsets };
  static constexpr unsigned dtype_field = 1, shape_field = 2, offsets_field = 4, all_fields = 7;

  [[noreturn]] void fail(std::string_view what) const {
    throw InputError(
        fmt::format("has a malformed .safetensors header: {} where the format has none, after the "
                    "key {}",
                    what, in_quotes(key_)));
  }

  void see(unsigned field) {
    if ((seen_ & field) != 0) {
      throw InputError(fmt::format("gives {} of tensor {} more than once", in_quotes(key_),
                                   in_quotes(entries_.back().name)));
    }
    seen_ |= field;
  }

  std::vector<SafetensorsEntry> entries_;
  std::string key_;
  Level level_ = Level::outside;
  unsigned seen_ = 0;
  int offsets_ = 0;
};

}  // namespace

std::vector<SafetensorsEntry> parse_safetensors_json(std::string_view json) {
  // The format asks for it. The JSON parser alone would take white space or a byte order mark too.
  if (!json.starts_with('{')) {
    throw InputError("has a malformed .safetensors header: not JSON that starts with '{'");
  }
  EntryReader reader;
  nlohmann::json::sax_parse(json.begin(), json.end(), &reader);
  return reader.take();
}

}  // namespace stream_cqsa
