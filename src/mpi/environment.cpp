#include "mpi/environment.hpp"

#include <mpi.h>

#include <algorithm>
#include <array>
#include <cstdlib>

#include "mpi/error.hpp"
#include "mpi/fault.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

// Whether this process was started by nobody who starts ranks: mpirun, srun or a PMI of another
// kind.
bool starts_alone() {
  constexpr std::array names = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PMI_FD"};
  return std::ranges::none_of(names, [](const char* name) { return std::getenv(name) != nullptr; });
}

}  // namespace

MpiEnvironment::MpiEnvironment(int& argc, char**& argv) {
  // We have no shared file pointers. Open MPI prepares them for every file that it opens all the
  // same, and its component sm does so in files whose names programs that start at once on one
  // machine can share. What the user chose stands; other MPI libraries do not look.
  ::setenv("OMPI_MCA_sharedfp", "^sm", 0);
  // Looking for the best of the networks takes a fifth of a second, and one rank needs none. What
  // the environment says stands.
  if (starts_alone()) ::setenv("OMPI_MCA_pml", "ob1", 0);
  prepare_for_lost_ranks();
  int provided = MPI_THREAD_SINGLE;
  STREAM_CQSA_MPI(MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided));
  try {
    if (provided < MPI_THREAD_MULTIPLE) {
      throw Error("this MPI library cannot be called from several threads (MPI_THREAD_MULTIPLE)");
    }
    STREAM_CQSA_MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    STREAM_CQSA_MPI(MPI_Comm_set_errhandler(MPI_COMM_SELF, MPI_ERRORS_RETURN));
    // The handler of MPI_FILE_NULL is that of failing opens and the default of every file.
    STREAM_CQSA_MPI(MPI_File_set_errhandler(MPI_FILE_NULL, MPI_ERRORS_RETURN));
    STREAM_CQSA_MPI(MPI_Comm_rank(MPI_COMM_WORLD, &rank_));
    STREAM_CQSA_MPI(MPI_Comm_size(MPI_COMM_WORLD, &size_));
  } catch (...) {
    MPI_Finalize();
    throw;
  }
}

MpiEnvironment::~MpiEnvironment() { MPI_Finalize(); }

bool MpiEnvironment::agree(bool said) const {
  const std::array own = {said ? 1 : 0, said ? 0 : 1};
  std::array<int, 2> any{};
  STREAM_CQSA_MPI(MPI_Allreduce(own.data(), any.data(), 2, MPI_INT, MPI_MAX, MPI_COMM_WORLD));
  return any[0] + any[1] == 1;
}

std::string MpiEnvironment::library_version() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> text{};
  int length = 0;
  STREAM_CQSA_MPI(MPI_Get_library_version(text.data(), &length));
  // Open MPI counts the terminating zero.
  const std::string version(text.data());
  return version.substr(0, version.find('\n'));
}

}  // namespace stream_cqsa
