// What the machine offers.
#pragma once

#include <cstdint>
#include <string>

namespace stream_cqsa {

struct Machine {
  std::string cpu;                    ///< model name
  int cores = 1;                      ///< that this process may run on
  std::int64_t memory = 0;            ///< bytes, the control group's limit if lower
  std::int64_t available_memory = 0;  ///< bytes that can be used now
};

Machine this_machine();

std::string host_name();

/// The process's largest resident set so far, in bytes.
std::int64_t peak_resident_bytes();

}  // namespace stream_cqsa
