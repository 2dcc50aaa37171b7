// MPI from start to end of a program.
#pragma once

#include <string>

namespace stream_cqsa {

/// Initialises MPI for calls from any thread, and finalises it when destroyed. Make it first in
/// main, once. Errors on MPI_COMM_WORLD, MPI_COMM_SELF and files return, so that STREAM_CQSA_MPI
/// throws.
class MpiEnvironment {
 public:
  /// Throws Error when MPI does not start or cannot be called from several threads.
  MpiEnvironment(int& argc, char**& argv);
  MpiEnvironment(const MpiEnvironment&) = delete;
  MpiEnvironment& operator=(const MpiEnvironment&) = delete;
  ~MpiEnvironment();

  int rank() const { return rank_; }  ///< in MPI_COMM_WORLD
  int size() const { return size_; }  ///< of MPI_COMM_WORLD

  /// Collective: whether all ranks say the same.
  bool agree(bool said) const;

  /// The MPI library's name and version, one line.
  static std::string library_version();

 private:
  int rank_ = 0;
  int size_ = 1;
};

}  // namespace stream_cqsa
