// Exceptions. Every message is one line: what is wrong, where, and what would work.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace stream_cqsa {

/// A failure during a run: a read that fails, a full disk, a device error. Exit status 1.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A device has not the memory that was to be allocated on it.
class OutOfDeviceMemory : public Error {
 public:
  OutOfDeviceMemory(const std::string& message, std::int64_t free_bytes)
      : Error(message), free_bytes_(free_bytes) {}
  /// What it had when it was asked.
  std::int64_t free_bytes() const { return free_bytes_; }

 private:
  std::int64_t free_bytes_;
};

/// The run ended early, and the same command continues it. Exit status 75 (EX_TEMPFAIL).
class Resumable : public Error {
 public:
  using Error::Error;
};
inline constexpr int stopped_status = 75;

/// Wrong usage or bad input, found before anything is written. Exit status 2.
class InputError : public Error {
 public:
  using Error::Error;
};

}  // namespace stream_cqsa
