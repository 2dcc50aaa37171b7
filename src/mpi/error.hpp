// MPI's error codes as exceptions.
#pragma once

#include <mpi.h>

#include <string>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

/// A rank that others need is lost.
class LostRank : public Error {
 public:
  using Error::Error;
};

/// MPI's text for an error code.
std::string mpi_error_text(int code);

/// Throws Error with the call's text, the code, MPI's text and the place, unless `code` is
/// MPI_SUCCESS; LostRank where a lost rank is why. Needs error handlers that return (see
/// MpiEnvironment).
void check_mpi(int code, const char* call, const char* file, int line);

}  // namespace stream_cqsa

#define STREAM_CQSA_MPI(call) ::stream_cqsa::check_mpi((call), #call, __FILE__, __LINE__)
