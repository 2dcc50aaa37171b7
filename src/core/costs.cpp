#include "stream_cqsa/costs.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <tuple>

namespace stream_cqsa {
namespace {

// In which a device's clocks fall from those after a pause.
constexpr double burst_seconds = 0.3;

void add_kernels(Costs& costs, DType dtype, std::int64_t dim, double burst, double sustained,
                 double launch_seconds) {
  for (const Mask mask : {Mask::none, Mask::causal}) {
    costs.kernels.push_back({dim, dtype, mask, sustained, burst, launch_seconds});
  }
}

}  // namespace

Costs builtin_costs(const DeviceTraits& device) {
  Costs costs;
  costs.device = device.name.empty() ? device.kind : device.name;
  if (device.kind == "cuda") {
    // One H200 and 16 cores.
    for (const DType dtype : {DType::f16, DType::bf16}) {
      add_kernels(costs, dtype, 64, 610e12, 545e12, 10e-6);
      add_kernels(costs, dtype, 128, 760e12, 660e12, 10e-6);
    }
    add_kernels(costs, DType::f32, 64, 25e12, 25e12, 10e-6);
    costs.copy_in = 54e9;
    costs.copy_out = 50e9;
    costs.device_merge = 1000e9;
    costs.merge = 20e9;
    costs.read = 12e9;
    costs.read_direct = 3e9;
    costs.generate = 5e9;
    costs.write = 3e9;
    costs.rewrite = 4e9;
    costs.receive = 4e9;
    costs.start_seconds = 3e-3;
    return costs;
  }
  // Two cores; of more, kernels alone are said to be faster: the rest shares one memory.
  const double share = static_cast<double>(device.threads) / 2;
  add_kernels(costs, DType::f32, 64, share * 95e9, share * 95e9, 50e-6);
  add_kernels(costs, DType::f32, 128, share * 115e9, share * 115e9, 50e-6);
  costs.copy_in = 5e9;
  costs.copy_out = 5e9;
  costs.device_merge = 8e9;
  costs.merge = 8e9;
  costs.read = 2e9;
  costs.read_direct = 1e9;
  costs.generate = 0.5e9;
  costs.write = 0.5e9;
  costs.rewrite = 1e9;
  costs.receive = 2e9;
  costs.start_seconds = 1e-3;
  return costs;
}

double read_rate(const Costs& costs, InputKind inputs) {
  return costs.*read_rate_member(costs, inputs);
}

double Costs::*read_rate_member(const Costs& costs, InputKind inputs) {
  if (inputs == InputKind::synthetic) return &Costs::generate;
  const bool direct = inputs == InputKind::direct_files && costs.read_direct > 0;
  return direct ? &Costs::read_direct : &Costs::read;
}

const KernelCost& kernel_cost(const Costs& costs, const Problem& problem) {
  const DType dtype = storage_type(problem.dtype);
  const auto distance = [&](const KernelCost& kernel) {
    const bool half = dtype != DType::f32;
    // 16-bit types run at about the same rate, fp32 on a GPU at another.
    const int type = kernel.dtype == dtype ? 0 : (kernel.dtype != DType::f32) == half ? 1 : 2;
    return std::tuple(type, std::abs(kernel.head_dim - problem.head_dim),
                      kernel.mask != problem.mask);
  };
  return *std::ranges::min_element(costs.kernels, {}, distance);
}

double kernel_seconds(const KernelCost& kernel, double flop, double launches) {
  const double steady = flop / kernel.flop_per_second;
  const double gain = 1 - kernel.flop_per_second / kernel.burst_flop_per_second;
  return steady - gain * burst_seconds * -std::expm1(-steady / burst_seconds) +
         launches * kernel.launch_seconds;
}

Stage Prediction::bottleneck() const {
  return static_cast<Stage>(std::ranges::max_element(busy) - busy.begin());
}

}  // namespace stream_cqsa
