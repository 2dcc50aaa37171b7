// open_tensor, create_tensor and create_tensors: formats told by the file's extension.
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <system_error>
#include <utility>
#include <vector>

#include "io/blocks.hpp"
#include "io/file_tensor.hpp"
#include "io/npy_header.hpp"
#include "io/partial_file.hpp"
#include "io/safetensors_header.hpp"
#include "io/stored_tensor.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/files.hpp"

namespace stream_cqsa {
namespace {

enum class Format { npy, safetensors };

Format format_of(const std::filesystem::path& path) {
  if (path.extension() == ".npy") return Format::npy;
  if (path.extension() == ".safetensors") return Format::safetensors;
  throw InputError(fmt::format("{}: unknown file format; name a .npy or .safetensors file",
                               in_quotes(path.string())));
}

/// The file's first bytes: as many as hold its header, told by `header_bytes` from a prefix.
template <typename HeaderBytes>
std::vector<std::byte> read_header(File& file, std::uint64_t file_size, std::uint64_t prefix_bytes,
                                   HeaderBytes header_bytes) {
  std::vector<std::byte> start(std::min(prefix_bytes, file_size));
  file.read_at(0, start);
  start.resize(header_bytes(start, file_size));
  file.read_at(0, start);
  return start;
}

/// `path` for messages.
NamedTensor find_stored(Format format, const std::string& path, const std::string& names,
                        File& file) {
  const std::uint64_t size = file.size();
  NamedTensor found{path, {}};
  if (format == Format::npy) {
    const auto start = read_header(file, size, npy_prefix_bytes, npy_header_bytes);
    found.tensor = parse_npy_header(start, size);
  } else {
    const auto start = read_header(file, size, safetensors_prefix_bytes, safetensors_header_bytes);
    found = find_tensor(parse_safetensors_header(start, size), names);
    found.name = fmt::format("{}:{}", path, printable(found.name));
  }
  return found;
}

/// `path` for messages.
std::unique_ptr<TensorSource> open_format(Format format, const std::string& path,
                                          const std::string& names, Layout layout,
                                          std::unique_ptr<File> file) {
  NamedTensor found = find_stored(format, path, names, *file);
  TensorDesc desc = describe(found.tensor, layout, std::move(found.name));
  return std::make_unique<FileSource>(std::move(desc), std::move(file), found.tensor.offset);
}

/// Opening a pipe would wait for its other end, and only regular files have offsets.
void check_regular(const std::filesystem::path& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) {
    throw InputError(
        fmt::format("{} cannot be opened: {}", printable(path.string()), error.message()));
  }
  if (!std::filesystem::is_regular_file(status)) {
    throw InputError(fmt::format("{} is not a regular file", printable(path.string())));
  }
}

void check_output(const std::filesystem::path& path, bool overwrite) {
  std::error_code ignored;
  if (!std::filesystem::exists(std::filesystem::symlink_status(path, ignored))) return;
  if (!std::filesystem::is_regular_file(path, ignored)) {
    throw InputError(fmt::format("{} exists and is not a regular file", printable(path.string())));
  }
  if (!overwrite) {
    throw InputError(
        fmt::format("{} exists; use --overwrite, or another name", printable(path.string())));
  }
}

std::unique_ptr<PartialFile> create_file(const std::filesystem::path& path, bool overwrite,
                                         const FileOpener& open, bool keep) {
  check_output(path, overwrite);
  try {
    return std::make_unique<PartialFile>(path, open, keep);
  } catch (const Error& error) {
    throw InputError(error.what());
  }
}

}  // namespace

std::unique_ptr<TensorSource> open_tensor(const std::filesystem::path& path,
                                          const std::string& tensor, Layout layout,
                                          const FileOpener& open) {
  const Format format = format_of(path);
  check_regular(path);
  std::unique_ptr<File> file;
  try {
    file = open(path, FileMode::read);
  } catch (const Error& error) {
    throw InputError(error.what());
  }
  try {
    return open_format(format, printable(path.string()), tensor, layout, std::move(file));
  } catch (const InputError& error) {
    throw InputError(fmt::format("{} {}", printable(path.string()), error.what()));
  } catch (const Error& error) {
    throw InputError(error.what());
  }
}

std::unique_ptr<TensorSink> create_tensor(const std::filesystem::path& path,
                                          const std::string& tensor, const TensorDesc& desc,
                                          bool overwrite, const FileOpener& open, bool keep) {
  TensorDesc named = desc;
  if (format_of(path) == Format::safetensors) {
    named.name = tensor;
    return std::move(create_tensors(path, {named}, overwrite, open, keep).front());
  }
  named.name = printable(path.string());
  check_desc(named);
  std::string header;
  try {
    header = format_npy_header(named.dtype, named.shape());
  } catch (const InputError& error) {
    throw InputError(fmt::format("{}: {}", named.name, error.what()));
  }
  auto file = std::make_shared<SharedFile>(create_file(path, overwrite, open, keep), header,
                                           named.bytes(), std::size_t{1});
  return std::make_unique<FileSink>(std::move(named), std::move(file), header.size());
}

std::unique_ptr<TensorSink> join_tensor(const std::filesystem::path& path,
                                        const std::string& tensor, const TensorDesc& desc,
                                        const FileOpener& open) {
  const Format format = format_of(path);
  std::filesystem::path partial = path;
  partial += ".partial";
  check_regular(partial);
  const std::string name = printable(partial.string());
  try {
    auto file = open(partial, FileMode::update);
    const NamedTensor found = find_stored(format, name, tensor, *file);
    const auto& shape = found.tensor.shape;
    const std::int64_t elements =
        std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
    if (found.tensor.dtype != desc.dtype || elements != desc.elements()) {
      throw InputError("holds another tensor than this run's");
    }
    TensorDesc named = desc;
    named.name = found.name;
    return std::make_unique<FileSink>(
        std::move(named), std::make_shared<SharedFile>(std::move(file)), found.tensor.offset);
  } catch (const InputError& error) {
    throw InputError(fmt::format("{} {}", name, error.what()));
  } catch (const Error& error) {
    throw InputError(error.what());
  }
}

std::vector<std::unique_ptr<TensorSink>> create_tensors(const std::filesystem::path& path,
                                                        std::vector<TensorDesc> descs,
                                                        bool overwrite, const FileOpener& open,
                                                        bool keep) {
  if (format_of(path) == Format::npy) {
    throw InputError(fmt::format("{}: a .npy file holds one tensor; name a .safetensors file",
                                 printable(path.string())));
  }
  std::vector<SafetensorsOutput> entries;
  std::int64_t data_bytes = 0;
  for (TensorDesc& desc : descs) {
    if (std::ranges::find(entries, desc.name, &SafetensorsOutput::name) != entries.end()) {
      throw InputError(fmt::format("{}: two tensors {}; give each a name of its own",
                                   printable(path.string()), in_quotes(desc.name)));
    }
    entries.push_back({desc.name, desc.dtype, {}});
    desc.name = printable(fmt::format("{}:{}", path.string(), desc.name));
    check_desc(desc);
    entries.back().shape = desc.shape();
    if (__builtin_add_overflow(data_bytes, desc.bytes(), &data_bytes)) {
      throw InputError(
          fmt::format("{}: the tensors' size in bytes overflows 64 bits; write them "
                      "to a file each",
                      printable(path.string())));
    }
  }
  const std::string header = format_safetensors_header(entries);
  const auto file = std::make_shared<SharedFile>(create_file(path, overwrite, open, keep), header,
                                                 data_bytes, descs.size());
  std::vector<std::unique_ptr<TensorSink>> sinks;
  std::uint64_t offset = header.size();
  for (TensorDesc& desc : descs) {
    const auto bytes = static_cast<std::uint64_t>(desc.bytes());
    sinks.push_back(std::make_unique<FileSink>(std::move(desc), file, offset));
    offset += bytes;
  }
  return sinks;
}

}  // namespace stream_cqsa
