// What the CPU backend computes with, for people.
#pragma once

#include <string>

namespace stream_cqsa {

/// The instruction set that vector code was dispatched to, such as "AVX2".
std::string cpu_vector_target();

/// OpenBLAS's version and the processor it was tuned for.
std::string cpu_blas_config();

}  // namespace stream_cqsa
