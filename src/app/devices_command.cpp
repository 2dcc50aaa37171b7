#include <fmt/format.h>

#include "app/commands.hpp"
#include "app/machine.hpp"
#include "cpu/features.hpp"
#include "stream_cqsa/bytes.hpp"

namespace stream_cqsa {

int devices_command(const Arguments& arguments, const MpiEnvironment&) {
  if (!parse(arguments,
             "usage: stream-cqsa devices\nSays what this machine offers to compute with.\n",
             OptionGroup())) {
    return 0;
  }
  const Machine machine = this_machine();
  fmt::print("cpu     {}\n", machine.cpu);
  fmt::print("        {} cores, vectors {}, BLAS {}\n", machine.cores, cpu_vector_target(),
             cpu_blas_config());
  fmt::print("memory  {}, {} available\n", format_bytes(machine.memory),
             format_bytes(machine.available_memory));
  return 0;
}

}  // namespace stream_cqsa
