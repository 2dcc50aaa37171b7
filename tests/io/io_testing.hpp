// What the tests of src/io share: temporary folders, files made byte by byte, files that count.
#pragma once

#include <stdlib.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "stream_cqsa/error.hpp"
#include "stream_cqsa/files.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa::testing {

/// A folder that goes with its contents.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "stream_cqsa_XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  bool empty() const { return std::filesystem::is_empty(path_); }

 private:
  std::filesystem::path path_;
};

inline void write_file(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

inline std::string little_endian(std::uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += static_cast<char>(value >> (8 * i) & 0xff);
  return text;
}

/// A .npy file of the given version around a header's text.
inline std::string npy_bytes(int version, const std::string& header, const std::string& data) {
  return std::string("\x93NUMPY") + static_cast<char>(version) + '\0' +
         little_endian(header.size(), version == 1 ? 2 : 4) + header + data;
}

inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  return little_endian(header.size(), 8) + header + data;
}

/// Elements of random bits, none of them NaN, infinite, or too large for fp32: each dtype's top
/// exponent bit is cleared.
inline std::string random_elements(std::mt19937_64& random, DType dtype, std::int64_t count) {
  const auto size = static_cast<std::size_t>(size_of(dtype));
  std::string bytes(static_cast<std::size_t>(count) * size, '\0');
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<char>(random());
    if (i % size == size - 1) bytes[i] = static_cast<char>(bytes[i] & 0xbf);
  }
  return bytes;
}

/// Elements in their storage type: fp64 rounded to fp32, others as they are.
inline std::string as_stored(DType dtype, const std::string& bytes) {
  if (dtype != DType::f64) return bytes;
  std::string out(bytes.size() / 2, '\0');
  for (std::size_t i = 0; i < out.size() / 4; ++i) {
    double value = 0;
    std::memcpy(&value, bytes.data() + 8 * i, 8);
    const auto rounded = static_cast<float>(value);
    std::memcpy(out.data() + 4 * i, &rounded, 4);
  }
  return out;
}

/// Where vector (batch, token, head) lies in a whole tensor, counted in vectors.
inline std::int64_t vector_at(const TensorDesc& desc, std::int64_t b, std::int64_t t,
                              std::int64_t h) {
  return desc.layout == Layout::bshd ? h + desc.heads * (t + desc.tokens * b)
                                     : t + desc.tokens * (h + desc.heads * b);
}

/// A block of `tensor` vector by vector, packed in `order`.
inline std::string block_of(const TensorDesc& desc, const std::string& tensor, const Block& block,
                            Layout order, std::int64_t element_bytes) {
  const auto bytes = static_cast<std::size_t>(desc.dim * element_bytes);
  const Range tokens = block.tokens, heads = block.heads;
  std::string out;
  const auto add = [&](std::int64_t t, std::int64_t h) {
    out +=
        tensor.substr(static_cast<std::size_t>(vector_at(desc, block.batch, t, h)) * bytes, bytes);
  };
  if (order == Layout::bshd) {
    for (auto t = tokens.begin; t < tokens.end; ++t) {
      for (auto h = heads.begin; h < heads.end; ++h) add(t, h);
    }
  } else {
    for (auto h = heads.begin; h < heads.end; ++h) {
      for (auto t = tokens.begin; t < tokens.end; ++t) add(t, h);
    }
  }
  return out;
}

inline Range random_range(std::mt19937_64& random, std::int64_t extent) {
  const auto below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
  };
  const std::int64_t begin = below(extent);
  return {begin, begin + 1 + below(extent - begin)};
}

inline std::string read_block(TensorSource& source, const Block& block) {
  const TensorDesc& desc = source.desc();
  std::string out(
      static_cast<std::size_t>(block.vectors() * desc.dim * size_of(storage_type(desc.dtype))),
      '\x55');
  source.read(block, std::as_writable_bytes(std::span(out)));
  return out;
}

/// Requests made to a file.
struct Requests {
  int reads = 0, writes = 0;
  std::uint64_t bytes_read = 0, bytes_written = 0;
};

/// Passes everything on to a POSIX file, and counts.
class CountingFile final : public File {
 public:
  CountingFile(std::unique_ptr<File> file, Requests& requests)
      : file_(std::move(file)), requests_(requests) {}
  std::uint64_t size() override { return file_->size(); }
  void read_at(std::uint64_t offset, std::span<std::byte> into) override {
    ++requests_.reads;
    requests_.bytes_read += into.size();
    file_->read_at(offset, into);
  }
  void write_at(std::uint64_t offset, std::span<const std::byte> from) override {
    ++requests_.writes;
    requests_.bytes_written += from.size();
    file_->write_at(offset, from);
  }
  void resize(std::uint64_t size) override { file_->resize(size); }
  void sync() override { file_->sync(); }

 private:
  std::unique_ptr<File> file_;
  Requests& requests_;
};

inline FileOpener counting(Requests& requests) {
  return [&requests](const std::filesystem::path& path, FileMode mode) {
    return std::make_unique<CountingFile>(open_posix_file(path, mode), requests);
  };
}

/// The message of the exception that `run` throws: exactly an E, in one line. Else a complaint.
template <typename E, typename Run>
std::string message_of(Run&& run) {
  try {
    run();
  } catch (const E& error) {
    const std::string text = error.what();
    if (typeid(error) != typeid(E)) return "another kind of error: " + text;
    if (text.find('\n') != text.npos || text.empty()) return "not one line: " + text;
    return text;
  }
  return "nothing thrown";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != text.npos;
}

}  // namespace stream_cqsa::testing
