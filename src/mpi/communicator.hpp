// Ranks that talk to each other.
#pragma once

#include <mpi.h>

#include <cstddef>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace stream_cqsa {

/// A message on its way. Its memory must stay valid, and this object alive, until done() is true.
class Request {
 public:
  Request() = default;
  /// `code` is what the call that made the handle returned.
  Request(MPI_Request handle, int code, const char* call);
  Request(Request&& other) noexcept { *this = std::move(other); }
  Request& operator=(Request&& other) noexcept;

  enum class State {
    pending,
    done,  ///< sent, or come; or there was no message
    lost,  ///< its rank is lost; of a receive from any rank: one is, and it goes on, once
           ///< Communicator::newly_lost() was asked which
  };
  /// Throws Error when the message failed otherwise.
  State test();
  /// The same; `source` is the rank that a message that has come is from.
  State test(int& source);

  /// Whether the message has been sent or has come. Throws LostRank where test() says `lost`.
  bool done();
  bool done(int& source);
  /// Whether MPI is done with the message's memory: true for a lost rank too.
  bool settled();
  /// Takes a receive back. It is done soon after, with its message or without.
  void cancel();

 private:
  MPI_Request handle_ = MPI_REQUEST_NULL;
  bool lost_ = false;
  bool cancelled_ = false;
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

  /// Ranks that are lost and that no earlier call has named. None, ever, with an MPI that does not
  /// tell.
  std::vector<int> newly_lost();
  bool is_lost(int rank) const { return lost_.contains(rank); }  ///< as newly_lost() has said

  /// Sends a text and waits until it is received; throws LostRank where it never will be.
  void send_text(int to, int tag, const std::string& text);
  /// Waits for the text of a rank. None where that is lost.
  std::optional<std::string> receive_text(int from, int tag);

  /// Ends all ranks at once, with the exit status, after printing `why` to standard error.
  [[noreturn]] void abort(const std::string& why, int status = 1);

  /// Collective, as is the next: throws LostRank where a rank is lost. Every rank's text, at rank
  /// 0; elsewhere none.
  std::vector<std::string> gather(const std::string& text);
  /// Collective: rank 0's text.
  std::string broadcast(std::string text);

 private:
  MPI_Comm handle_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  std::set<int> lost_;
};

}  // namespace stream_cqsa
