// Tensors in .npy and .safetensors files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// Bytes of a file at 64-bit offsets. Thread-safe, for writes to ranges apart. Failures throw Error
/// with the file's name and the system's reason; a read or write that comes up short is a failure.
class File {
 public:
  virtual ~File() = default;
  virtual std::uint64_t size() = 0;
  virtual void read_at(std::uint64_t offset, std::span<std::byte> into) = 0;
  virtual void write_at(std::uint64_t offset, std::span<const std::byte> from) = 0;
  virtual void resize(std::uint64_t size) = 0;
  /// Makes what was written durable.
  virtual void sync() = 0;
};

enum class FileMode {
  read,
  create,  ///< read and write; truncates what is there
  update,  ///< read and write; keeps what is there, or creates it
};

/// How files are opened: plain system calls, or MPI I/O (src/mpi/file.hpp).
using FileOpener = std::function<std::unique_ptr<File>(const std::filesystem::path&, FileMode)>;

std::unique_ptr<File> open_posix_file(const std::filesystem::path& path, FileMode mode);

/// Opens files as `usual` does, and reads those that are opened for reading past the page cache
/// (O_DIRECT), for inputs that memory could not keep anyway: in requests of about 2 MiB, through a
/// buffer of 2.2 MiB for each thread that reads at once, whatever the number of files. Ranges need
/// not be aligned. Where a file system refuses, files are read as `usual` reads them, and `refused`
/// is called with a line for people, once.
FileOpener direct_opener(FileOpener usual, std::function<void(const std::string&)> refused);

/// Opens one tensor of a .npy or .safetensors file (told by the extension). `tensor` names the
/// tensor of a .safetensors file, or lists names to try in order separated by '|'; it is ignored
/// for .npy. Throws InputError when the file is not readable, malformed, truncated, or of a dtype,
/// rank or byte order that is not supported.
std::unique_ptr<TensorSource> open_tensor(const std::filesystem::path& path,
                                          const std::string& tensor, Layout layout,
                                          const FileOpener& open = open_posix_file);

/// Creates `path` (.npy or .safetensors; `tensor` names the tensor inside the latter) for writing,
/// as `path`.partial until commit(). desc.name is replaced by the file's. Throws InputError when
/// the extension is unknown, the dtype is not one the format has (.npy has no bfloat16), the file
/// cannot be created, `path`.partial is being written by another sink (of any process) or is not a
/// regular file, or `path` exists and not `overwrite`.
/// With `keep`, `path`.partial is taken over as another run left it, and stays if not committed.
/// With `staged`, and not `keep`, parts of the heads of a bshd tensor may lie elsewhere in its part
/// of the file until commit(), which writes head groups several times faster; no one else may use
/// that file meanwhile.
std::unique_ptr<TensorSink> create_tensor(const std::filesystem::path& path,
                                          const std::string& tensor, const TensorDesc& desc,
                                          bool overwrite, const FileOpener& open = open_posix_file,
                                          bool keep = false, bool staged = false);

/// Opens `path`.partial, which another process has made by create_tensor() and not committed, for
/// writing some blocks of that tensor while others write other token rows. commit() is the other's:
/// here it is std::logic_error. `tensor` and `desc` are as for create_tensor(). Throws InputError
/// when the file is not there or does not hold such a tensor.
std::unique_ptr<TensorSink> join_tensor(const std::filesystem::path& path,
                                        const std::string& tensor, const TensorDesc& desc,
                                        const FileOpener& open = open_posix_file);

/// Creates `path` (.safetensors) for several tensors, each under its desc.name in the file: a sink
/// for each, in this order. As create_tensor, but the file gets its name by the last of their
/// commits, one for each; where a sink is destroyed without, nothing remains of any. Throws
/// InputError for two tensors of one name, too.
std::vector<std::unique_ptr<TensorSink>> create_tensors(const std::filesystem::path& path,
                                                        std::vector<TensorDesc> descs,
                                                        bool overwrite,
                                                        const FileOpener& open = open_posix_file,
                                                        bool keep = false);

/// A tensor in the caller's memory, packed in the order of desc.layout: resident, for embedding and
/// for tests. `data` holds the storage type: fp32 for a desc of dtype f64. Throws InputError unless
/// it is exactly as large as desc says.
std::unique_ptr<TensorSource> make_memory_source(TensorDesc desc, std::span<const std::byte> data);

/// A tensor written into the caller's memory, packed in the order of desc.layout, as desc.dtype.
/// commit() and sync() do nothing. Throws InputError unless `data` is exactly desc.bytes() large.
std::unique_ptr<TensorSink> make_memory_sink(TensorDesc desc, std::span<std::byte> data);

}  // namespace stream_cqsa
