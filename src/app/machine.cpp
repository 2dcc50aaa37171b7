#include "app/machine.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>

namespace stream_cqsa {
namespace {

// The value of a "name : value" line of a /proc file, or nothing.
std::optional<std::string> proc_value(const char* file, const std::string& name) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    const auto colon = line.find(':');
    if (colon == std::string::npos || line.compare(0, name.size(), name) != 0) continue;
    const auto begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return std::nullopt;
}

std::int64_t meminfo_bytes(const std::string& name) {
  const auto value = proc_value("/proc/meminfo", name + ":");
  return value ? std::stoll(*value) * 1024 : 0;
}

// A control group's memory file, or nothing where there is no limit.
std::optional<std::int64_t> cgroup_bytes(const char* file) {
  std::ifstream in(file);
  std::int64_t bytes = 0;
  if (in >> bytes) return bytes;
  return std::nullopt;
}

}  // namespace

Machine this_machine() {
  Machine machine;
  machine.cpu = proc_value("/proc/cpuinfo", "model name").value_or("unknown");
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) machine.cores = CPU_COUNT(&set);
  machine.memory = meminfo_bytes("MemTotal");
  machine.available_memory = meminfo_bytes("MemAvailable");
  if (const auto limit = cgroup_bytes("/sys/fs/cgroup/memory.max")) {
    const std::int64_t used = cgroup_bytes("/sys/fs/cgroup/memory.current").value_or(0);
    machine.memory = std::min(machine.memory, *limit);
    machine.available_memory =
        std::min(machine.available_memory, std::max<std::int64_t>(*limit - used, 0));
  }
  return machine;
}

std::string host_name() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

std::int64_t peak_resident_bytes() {
  // Not getrusage: its maximum includes the program that started this one.
  const auto peak = proc_value("/proc/self/status", "VmHWM:");
  return peak ? std::stoll(*peak) * 1024 : 0;
}

}  // namespace stream_cqsa
