#include "mpi/fault.hpp"

#include <cstdlib>
#include <numeric>

#include "mpi/error.hpp"

#if __has_include(<mpi-ext.h>)
#include <mpi-ext.h>
#endif

namespace stream_cqsa {

#ifdef MPIX_ERR_PROC_FAILED

namespace {

int class_of(int code) {
  int error_class = MPI_SUCCESS;
  return MPI_Error_class(code, &error_class) == MPI_SUCCESS ? error_class : MPI_ERR_UNKNOWN;
}

}  // namespace

bool survives_lost_ranks() { return true; }

void prepare_for_lost_ranks() {
  // Open MPI's MPI_Finalize waits until all ranks are there. With one lost that wait may have no
  // end (seen with 5.0.11), and all messages have come before it. What the user chose stands.
  if (std::getenv("OMPI_MCA_mpi_ft_enable")) ::setenv("OMPI_MCA_async_mpi_finalize", "1", 0);
}

bool says_lost(int code) {
  if (code == MPI_SUCCESS) return false;
  const int error_class = class_of(code);
  return error_class == MPIX_ERR_PROC_FAILED || error_class == MPIX_ERR_PROC_FAILED_PENDING ||
         error_class == MPIX_ERR_REVOKED;
}

bool says_lost_and_pending(int code) {
  return code != MPI_SUCCESS && class_of(code) == MPIX_ERR_PROC_FAILED_PENDING;
}

std::vector<int> acknowledge_lost(MPI_Comm communicator) {
  MPI_Group lost = MPI_GROUP_NULL, all = MPI_GROUP_NULL;
  STREAM_CQSA_MPI(MPIX_Comm_failure_ack(communicator));
  STREAM_CQSA_MPI(MPIX_Comm_failure_get_acked(communicator, &lost));
  STREAM_CQSA_MPI(MPI_Comm_group(communicator, &all));
  int count = 0;
  STREAM_CQSA_MPI(MPI_Group_size(lost, &count));
  std::vector<int> places(static_cast<std::size_t>(count)), ranks(places.size());
  std::iota(places.begin(), places.end(), 0);
  STREAM_CQSA_MPI(MPI_Group_translate_ranks(lost, count, places.data(), all, ranks.data()));
  // An empty group may be a predefined one, which must not be freed.
  if (lost != MPI_GROUP_EMPTY) STREAM_CQSA_MPI(MPI_Group_free(&lost));
  STREAM_CQSA_MPI(MPI_Group_free(&all));
  return ranks;
}

#else

bool survives_lost_ranks() { return false; }
void prepare_for_lost_ranks() {}
bool says_lost(int) { return false; }
bool says_lost_and_pending(int) { return false; }
std::vector<int> acknowledge_lost(MPI_Comm) { return {}; }

#endif

}  // namespace stream_cqsa
