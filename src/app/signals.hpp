// What signals do to the program.
#pragma once

#include "stream_cqsa/checkpoint.hpp"

namespace stream_cqsa {

/// The process's request to whoever runs: set by signals, looked at by the engine.
StopRequest& stop_request();

/// From now on the signals by which a user, a shell, a pipe or a queue ends programs (INT, TERM, HUP,
/// PIPE, USR1, USR2, XCPU) remove unfinished files before they end the process. What is ignored, as
/// by nohup, or has another meaning by now, stays so.
void clean_up_on_signals();

/// From now on SIGUSR1 does not end the process: for a run that has no checkpoint to make yet.
void count_requests_for_checkpoints();

/// From now on SIGUSR1 asks for a checkpoint, and SIGINT, SIGTERM, SIGHUP and SIGXCPU for one and the
/// end: by stop_request() while that is watched, else by ending at once with the exit status 75.
void checkpoint_on_signals();

/// From now on those that ask for a checkpoint or an end do nothing: another rank answers them and
/// tells this one when to end, or there is nothing left to stop.
void ignore_signals();

}  // namespace stream_cqsa
