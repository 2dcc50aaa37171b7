#include "mpi/communicator.hpp"

#include <fmt/format.h>

#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <utility>

#include "mpi/error.hpp"
#include "mpi/fault.hpp"
#include "mpi/poll.hpp"

namespace stream_cqsa {

Request::Request(MPI_Request handle, int code, const char* call) : handle_(handle) {
  lost_ = says_lost(code);
  if (!lost_) check_mpi(code, call, __FILE__, __LINE__);
}

Request& Request::operator=(Request&& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(lost_, other.lost_);
  std::swap(cancelled_, other.cancelled_);
  return *this;
}

Request::State Request::test() {
  int source = 0;
  return test(source);
}

Request::State Request::test(int& source) {
  if (handle_ == MPI_REQUEST_NULL) return lost_ ? State::lost : State::done;
  int flag = 0;
  MPI_Status status;
  const int code = MPI_Test(&handle_, &flag, &status);
  if (says_lost(code)) {
    lost_ = cancelled_ || !says_lost_and_pending(code);
    // Cancelled after the loss was noticed, it is over for MPI and stays an error all the same.
    if (lost_ && handle_ != MPI_REQUEST_NULL) STREAM_CQSA_MPI(MPI_Request_free(&handle_));
    return State::lost;
  }
  check_mpi(code, "MPI_Test", __FILE__, __LINE__);
  if (flag == 0) return State::pending;
  source = status.MPI_SOURCE;
  return State::done;
}

bool Request::done() {
  int source = 0;
  return done(source);
}

bool Request::done(int& source) {
  const State state = test(source);
  if (state == State::lost) throw LostRank("a rank was lost whose message was waited for");
  return state == State::done;
}

bool Request::settled() {
  test();
  return handle_ == MPI_REQUEST_NULL;
}

void Request::cancel() {
  if (handle_ == MPI_REQUEST_NULL) return;
  STREAM_CQSA_MPI(MPI_Cancel(&handle_));
  cancelled_ = true;
}

Communicator::Communicator() {
  STREAM_CQSA_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &handle_));
  STREAM_CQSA_MPI(MPI_Comm_set_errhandler(handle_, MPI_ERRORS_RETURN));
  STREAM_CQSA_MPI(MPI_Comm_rank(handle_, &rank_));
  STREAM_CQSA_MPI(MPI_Comm_size(handle_, &size_));
}

Communicator::~Communicator() { MPI_Comm_free(&handle_); }

Request Communicator::send(int to, int tag, std::span<const std::byte> data) {
  MPI_Request handle = MPI_REQUEST_NULL;
  const int code =
      MPI_Issend(data.data(), static_cast<int>(data.size()), MPI_BYTE, to, tag, handle_, &handle);
  return {handle, code, "MPI_Issend"};
}

Request Communicator::receive(int from, int tag, std::span<std::byte> into) {
  MPI_Request handle = MPI_REQUEST_NULL;
  const int code =
      MPI_Irecv(into.data(), static_cast<int>(into.size()), MPI_BYTE, from, tag, handle_, &handle);
  return {handle, code, "MPI_Irecv"};
}

std::vector<int> Communicator::newly_lost() {
  std::vector<int> ranks = acknowledge_lost(handle_);
  std::erase_if(ranks, [&](int rank) { return !lost_.insert(rank).second; });
  return ranks;
}

void Communicator::send_text(int to, int tag, const std::string& text) {
  const std::uint64_t length = text.size();
  Pause pause;
  for (const auto data : {std::as_bytes(std::span(&length, 1)), std::as_bytes(std::span(text))}) {
    for (Request request = send(to, tag, data); !request.done();) pause.after(false, true);
  }
}

std::optional<std::string> Communicator::receive_text(int from, int tag) {
  std::uint64_t length = 0;
  std::string text;
  Pause pause;
  const auto came = [&](std::span<std::byte> into) {
    Request request = receive(from, tag, into);
    while (!request.settled()) pause.after(false, true);
    return request.test() == Request::State::done;
  };
  if (!came(std::as_writable_bytes(std::span(&length, 1)))) return std::nullopt;
  text.resize(length);
  if (!came(std::as_writable_bytes(std::span(text)))) return std::nullopt;
  return text;
}

void Communicator::abort(const std::string& why, int status) {
  fmt::print(stderr, "stream-cqsa: {}\n", why);
  MPI_Abort(handle_, status);
  std::abort();
}

std::vector<std::string> Communicator::gather(const std::string& text) {
  const int length = static_cast<int>(text.size());
  std::vector<int> lengths(static_cast<std::size_t>(rank_ == 0 ? size_ : 0));
  STREAM_CQSA_MPI(MPI_Gather(&length, 1, MPI_INT, lengths.data(), 1, MPI_INT, 0, handle_));
  std::vector<int> offsets(lengths.size());
  std::exclusive_scan(lengths.begin(), lengths.end(), offsets.begin(), 0);
  std::string all(rank_ == 0 ? static_cast<std::size_t>(offsets.back() + lengths.back()) : 0, ' ');
  STREAM_CQSA_MPI(MPI_Gatherv(text.data(), length, MPI_CHAR, all.data(), lengths.data(),
                              offsets.data(), MPI_CHAR, 0, handle_));
  std::vector<std::string> texts;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    texts.push_back(
        all.substr(static_cast<std::size_t>(offsets[i]), static_cast<std::size_t>(lengths[i])));
  }
  return texts;
}

std::string Communicator::broadcast(std::string text) {
  int length = static_cast<int>(text.size());
  STREAM_CQSA_MPI(MPI_Bcast(&length, 1, MPI_INT, 0, handle_));
  text.resize(static_cast<std::size_t>(length));
  STREAM_CQSA_MPI(MPI_Bcast(text.data(), length, MPI_CHAR, 0, handle_));
  return text;
}

}  // namespace stream_cqsa
