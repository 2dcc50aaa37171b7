// Files over MPI I/O.
#pragma once

#include <filesystem>
#include <memory>

#include "stream_cqsa/files.hpp"

namespace stream_cqsa {

/// A FileOpener over MPI_COMM_SELF. MPI must be initialised, and every file closed before it ends.
std::unique_ptr<File> open_mpi_file(const std::filesystem::path& path, FileMode mode);

}  // namespace stream_cqsa
