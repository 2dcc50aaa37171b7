// Ranks that talk to each other.
#pragma once

#include <mpi.h>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace stream_cqsa {

/// A message on its way. Its memory must stay valid, and this object alive, until done() is true.
class Request {
 public:
  Request() = default;
  explicit Request(MPI_Request handle) : handle_(handle) {}
  Request(Request&& other) noexcept : handle_(other.handle_) { other.handle_ = MPI_REQUEST_NULL; }
  Request& operator=(Request&& other) noexcept;

  /// Whether the message has been sent or has come; true for no message. Throws Error when it
  /// failed.
  bool done();
  /// The same; `source` is then the rank that a received message is from.
  bool done(int& source);

 private:
  MPI_Request handle_ = MPI_REQUEST_NULL;
};

/// A communicator of its own, freed on destruction. Calls block only where they say so. Messages
/// are bytes between machines of one kind, at most 2^31 - 1 of them.
class Communicator {
 public:
  /// A copy of MPI_COMM_WORLD. Collective.
  Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  ~Communicator();

  int rank() const { return rank_; }
  int size() const { return size_; }

  /// Done when the receiver has asked for the message: until then MPI keeps no copy of it.
  Request send(int to, int tag, std::span<const std::byte> data);
  /// `from` may be MPI_ANY_SOURCE.
  Request receive(int from, int tag, std::span<std::byte> into);

  /// Ends all ranks at once, with the exit status 1, after printing `why` to standard error.
  [[noreturn]] void abort(const std::string& why);

  /// Collective: every rank's text, at rank 0; elsewhere none.
  std::vector<std::string> gather(const std::string& text);
  /// Collective: rank 0's text.
  std::string broadcast(std::string text);

 private:
  MPI_Comm handle_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
};

}  // namespace stream_cqsa
