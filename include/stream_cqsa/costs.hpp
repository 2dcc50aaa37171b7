// What work costs on a machine, and how long a plan will take there.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

/// The attention kernel for one head dimension, element type and mask.
struct KernelCost {
  std::int64_t head_dim = 64;
  DType dtype = DType::f32;  ///< in device memory
  Mask mask = Mask::none;
  double flop_per_second = 0;  ///< when the device has been busy for seconds, its power limit binds
  double burst_flop_per_second = 0;  ///< when it was idle before
  double launch_seconds = 0;         ///< of each launch, however little it computes
  friend bool operator==(const KernelCost&, const KernelCost&) = default;
};

/// Rates of one rank, of all its threads together, in bytes per second.
struct Costs {
  std::string device;               ///< DeviceTraits::name, or kind where that is empty
  bool measured = false;            ///< by `bench --save`; else values for a machine of that kind
  std::vector<KernelCost> kernels;  ///< at least one
  double copy_in = 0;               ///< host to device
  double copy_out = 0;              ///< device to host
  double device_merge = 0;          ///< of partials, on the device; 0 where that does not merge
  double merge = 0;                 ///< of partials, on the host
  double read = 0;                  ///< files to host memory, their fingerprints taken
  double read_direct = 0;           ///< the same past the page cache; 0: not known, as `read`
  double generate = 0;              ///< the same of synthetic inputs
  double write = 0;                 ///< finished rows to files beside merging, with fingerprints
  double rewrite = 0;               ///< rows of which the last heads come: all are put in order
  double receive = 0;               ///< partials, or finished rows, from other ranks
  double start_seconds = 0;         ///< before the first byte is read

  friend bool operator==(const Costs&, const Costs&) = default;
};

/// Of a run on several ranks.
struct SharedCosts {
  Costs merging;               ///< of the rank that merges and writes
  std::vector<Costs> workers;  ///< of each one that computes; none: as many as planned, alike
};

/// How inputs come.
enum class InputKind {
  files,         ///< as the page cache gives them
  direct_files,  ///< past it
  synthetic,
};

/// Bytes per second of inputs that come so.
double read_rate(const Costs& costs, InputKind inputs);
/// Which rate that is.
double Costs::*read_rate_member(const Costs& costs, InputKind inputs);

/// Costs of a usual machine with such a device, for where none were measured.
Costs builtin_costs(const DeviceTraits& device);

/// The costs of the kernel that computes `problem`: of those known, the nearest head dimension, of
/// the same type and mask where there is such a one.
const KernelCost& kernel_cost(const Costs& costs, const Problem& problem);

/// Seconds that `flop` floating-point operations in `launches` launches keep the device busy, the
/// first of them after a pause. Clocks fall to what the power limit allows within half a second.
double kernel_seconds(const KernelCost& kernel, double flop, double launches);

std::string to_json_text(const Costs& costs);
/// Throws InputError, naming `name`, for anything that to_json_text() does not give.
Costs costs_from_json(const std::string& text, const std::string& name);

/// What a run is expected to take.
struct Prediction {
  double seconds = 0;  ///< from the first read to the last write
  /// Seconds in which each stage works at its rate; of several workers, that of the busiest.
  std::array<double, stage_count> busy{};

  double busy_of(Stage stage) const { return busy[static_cast<std::size_t>(stage)]; }
  /// The stage that is busy longest.
  Stage bottleneck() const;
};

/// Follows the plan's subproblems through reading, copying in, computing, copying out, accumulators
/// to and from their file, merging and writing, each of which does one thing after another, as far
/// ahead of the next as slots and buffers allow. Loads of chunks are averages of a sweep over the
/// quorums (estimate_traffic()), and of many quorums some stand for all. What a worker takes is
/// what it is done with before any other would be.
///
/// With `from`, the number of a head group (see group_number()), that and those after it alone:
/// what is left of the plan's run when all before are computed. Never those of Plan::groups_done.
Prediction predict(const Plan& plan, const SharedCosts& costs, InputKind inputs,
                   std::int64_t from = 0);
/// The same where all ranks are alike.
Prediction predict(const Plan& plan, const Costs& costs, InputKind inputs, std::int64_t from = 0);

/// That files hold a run up: it takes over 5% longer than it would with files of any speed.
struct DiskBound {
  Stage stage = Stage::read;   ///< of read, spill and write, the one that is busy longest
  double busy_seconds = 0;     ///< of it
  double seconds = 0;          ///< of the run
  double rate = 0;             ///< bytes per second of the stage
  double enough = 0;           ///< from which on, all files being as much faster, it is within 5%
  double seconds_unbound = 0;  ///< of the run with files of any speed
};

/// Whether files bind the run that predict() follows, and how much faster they would have to be.
/// Synthetic inputs are no files.
std::optional<DiskBound> disk_bound(const Plan& plan, const SharedCosts& costs, InputKind inputs);
std::optional<DiskBound> disk_bound(const Plan& plan, const Costs& costs, InputKind inputs);

}  // namespace stream_cqsa
