#include <fmt/format.h>

#include "app/commands.hpp"
#include "app/machine.hpp"
#include "cpu/features.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/cuda_backend.hpp"

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
  const auto devices = cuda_devices();
  if (devices.empty()) fmt::print("cuda    none: {}\n", why_no_cuda_devices());
  for (std::size_t number = 0; number < devices.size(); ++number) {
    const CudaDevice& device = devices[number];
    fmt::print("cuda {}  {}\n", number, device.name);
    fmt::print("        compute capability {}.{}, {} multiprocessors, {}, {} free\n", device.major,
               device.minor, device.multiprocessors, format_bytes(device.memory),
               format_bytes(cuda_free_memory(static_cast<int>(number))));
    const auto obstacle = cuda_obstacle({static_cast<int>(number)});
    fmt::print("        {}\n", obstacle.empty()
                                   ? "16-bit inputs: " + cuda_kernel(static_cast<int>(number)) +
                                         " kernel; fp32: portable kernel"
                                   : obstacle);
  }
  return 0;
}

}  // namespace stream_cqsa
