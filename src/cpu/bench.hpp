// The CPU's ceiling, for the command `bench`.
#pragma once

namespace stream_cqsa {

/// Floating-point operations per second of `threads` threads (0: one per core) that each multiply
/// square fp32 matrices of 1024 rows with OpenBLAS; the best of several rounds. This is the ceiling
/// that the kernel is measured against.
double bench_sgemm_flops(int threads);

}  // namespace stream_cqsa
