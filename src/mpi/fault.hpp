// Lost ranks, as an MPI with user-level fault mitigation (ULFM) tells of them. With another MPI a
// lost rank ends all, and nothing here has anything to say.
#pragma once

#include <mpi.h>

#include <vector>

namespace stream_cqsa {

/// Whether this was built with an MPI in which others can go on when a rank is lost. The launcher
/// must let them: Open MPI's does with `--with-ft ulfm`.
bool survives_lost_ranks();

/// What must be settled before MPI starts.
void prepare_for_lost_ranks();

/// Whether a call of MPI failed because a rank is lost.
bool says_lost(int code);

/// Whether it did so without ending the request: a receive from any rank, whose message may still
/// come from another once acknowledge_lost() was called.
bool says_lost_and_pending(int code);

/// The ranks of a communicator that are lost. Receives from any rank go on without them.
std::vector<int> acknowledge_lost(MPI_Comm communicator);

}  // namespace stream_cqsa
