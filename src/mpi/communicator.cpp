#include "mpi/communicator.hpp"

#include <fmt/format.h>

#include <cstdlib>
#include <numeric>
#include <utility>

#include "mpi/error.hpp"

namespace stream_cqsa {

Request& Request::operator=(Request&& other) noexcept {
  std::swap(handle_, other.handle_);
  return *this;
}

bool Request::done() {
  int source = 0;
  return done(source);
}

bool Request::done(int& source) {
  if (handle_ == MPI_REQUEST_NULL) return true;
  int flag = 0;
  MPI_Status status;
  STREAM_CQSA_MPI(MPI_Test(&handle_, &flag, &status));
  if (flag != 0) source = status.MPI_SOURCE;
  return flag != 0;
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
  STREAM_CQSA_MPI(
      MPI_Issend(data.data(), static_cast<int>(data.size()), MPI_BYTE, to, tag, handle_, &handle));
  return Request(handle);
}

Request Communicator::receive(int from, int tag, std::span<std::byte> into) {
  MPI_Request handle = MPI_REQUEST_NULL;
  STREAM_CQSA_MPI(
      MPI_Irecv(into.data(), static_cast<int>(into.size()), MPI_BYTE, from, tag, handle_, &handle));
  return Request(handle);
}

void Communicator::abort(const std::string& why) {
  fmt::print(stderr, "stream-cqsa: {}\n", why);
  MPI_Abort(handle_, 1);
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
