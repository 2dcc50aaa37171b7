// One function per command: parses its own arguments and returns the exit status.
#pragma once

#include "app/arguments.hpp"
#include "mpi/environment.hpp"

namespace stream_cqsa {

int run_command(const Arguments& arguments, const MpiEnvironment& mpi);
int plan_command(const Arguments& arguments, const MpiEnvironment& mpi);
int rehearse_command(const Arguments& arguments, const MpiEnvironment& mpi);
int generate_command(const Arguments& arguments, const MpiEnvironment& mpi);
int verify_command(const Arguments& arguments, const MpiEnvironment& mpi);
int devices_command(const Arguments& arguments, const MpiEnvironment& mpi);
int bench_command(const Arguments& arguments, const MpiEnvironment& mpi);

}  // namespace stream_cqsa
