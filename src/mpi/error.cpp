#include "mpi/error.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "mpi/fault.hpp"

namespace stream_cqsa {

std::string mpi_error_text(int code) {
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  if (MPI_Error_string(code, text.data(), &length) != MPI_SUCCESS) return "unknown MPI error";
  std::string line(text.data(), static_cast<std::size_t>(length));
  std::ranges::replace(line, '\n', ' ');
  return line;
}

void check_mpi(int code, const char* call, const char* file, int line) {
  if (code == MPI_SUCCESS) return;
  const std::string_view path = file;
  const std::string text =
      fmt::format("{} failed with MPI error {} ({}) at {}:{}", call, code, mpi_error_text(code),
                  path.substr(path.rfind('/') + 1), line);
  if (says_lost(code)) throw LostRank("a rank was lost: " + text);
  throw Error(text);
}

}  // namespace stream_cqsa
