// Rates of the CPU backend, for the command `bench`.
#pragma once

#include "stream_cqsa/problem.hpp"

namespace stream_cqsa {

/// Floating-point operations per second of `threads` threads (0: one per core) that each multiply
/// square fp32 matrices of 1024 rows with OpenBLAS; the best of several rounds. This is the ceiling
/// that the kernel is measured against.
double bench_sgemm_flops(int threads);

struct KernelRate {
  double flops = 0;    ///< per second; 4 * head_dim for every score that the mask keeps
  double seconds = 0;  ///< of the fastest launch
};

/// Times launches that compute the whole problem, inputs resident, with `threads` threads (0: one
/// per core): at least two, and more until `seconds` have passed. Batch must be 1.
KernelRate bench_kernel(const Problem& problem, int threads, double seconds);

}  // namespace stream_cqsa
