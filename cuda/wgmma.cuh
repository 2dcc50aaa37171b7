// Warpgroup products (wgmma) of every width that the Hopper kernel uses. Compute capability 9.0a.
//
// Inline assembly names every register, so each width is an instantiation of one macro.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace stream_cqsa::cuda {

/// Products m64 x (2 Columns) x k16, accumulated in fp32. Members:
///
///     shared(c, a, b, add)     c (+)= a b, both operands in shared memory, k contiguous
///     registers(c, a, b, add)  the same with a in registers and b's columns contiguous
///
/// a and b are descriptors (wgmma_descriptor()); without `add` c is overwritten.
template <class T, int Columns>
struct Wgmma;

// clang-format off
#define WGMMA_C8(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), \
                       "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define WGMMA_LIST_8(c) WGMMA_C8(c, 0)
#define WGMMA_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_LIST_16(c) WGMMA_LIST_8(c), WGMMA_C8(c, 8)
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_LIST_24(c) WGMMA_LIST_16(c), WGMMA_C8(c, 16)
#define WGMMA_NAMES_24 WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_LIST_32(c) WGMMA_LIST_24(c), WGMMA_C8(c, 24)
#define WGMMA_NAMES_32 WGMMA_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_LIST_40(c) WGMMA_LIST_32(c), WGMMA_C8(c, 32)
#define WGMMA_NAMES_40 WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_LIST_48(c) WGMMA_LIST_40(c), WGMMA_C8(c, 40)
#define WGMMA_NAMES_48 WGMMA_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_LIST_56(c) WGMMA_LIST_48(c), WGMMA_C8(c, 48)
#define WGMMA_NAMES_56 WGMMA_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_LIST_64(c) WGMMA_LIST_56(c), WGMMA_C8(c, 56)
#define WGMMA_NAMES_64 WGMMA_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_LIST_72(c) WGMMA_LIST_64(c), WGMMA_C8(c, 64)
#define WGMMA_NAMES_72 WGMMA_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_LIST_80(c) WGMMA_LIST_72(c), WGMMA_C8(c, 72)
#define WGMMA_NAMES_80 WGMMA_NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_LIST_88(c) WGMMA_LIST_80(c), WGMMA_C8(c, 80)
#define WGMMA_NAMES_88 WGMMA_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_LIST_96(c) WGMMA_LIST_88(c), WGMMA_C8(c, 88)
#define WGMMA_NAMES_96 WGMMA_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_LIST_104(c) WGMMA_LIST_96(c), WGMMA_C8(c, 96)
#define WGMMA_NAMES_104 WGMMA_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_LIST_112(c) WGMMA_LIST_104(c), WGMMA_C8(c, 104)
#define WGMMA_NAMES_112 WGMMA_NAMES_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_LIST_120(c) WGMMA_LIST_112(c), WGMMA_C8(c, 112)
#define WGMMA_NAMES_120 WGMMA_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_LIST_128(c) WGMMA_LIST_120(c), WGMMA_C8(c, 120)
#define WGMMA_NAMES_128 WGMMA_NAMES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"

// The numbers after `columns` are those of the operands that follow the accumulators.
#define WGMMA_OF(type, name, width, columns, o0, o1, o2, o3, o4, o5)                             \
  template <>                                                                                     \
  struct Wgmma<type, columns> {                                                                   \
    __device__ __forceinline__ static void shared(float (&c)[columns], std::uint64_t a,           \
                                                  std::uint64_t b, int add) {                     \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2 ", 0;\n"                              \
                   "wgmma.mma_async.sync.aligned.m64n" #width "k16.f32." name "." name            \
                   " {" WGMMA_NAMES_##columns "}, %" #o0 ", %" #o1 ", p, 1, 1, 0, 0;\n}\n"        \
                   : WGMMA_LIST_##columns(c)                                                      \
                   : "l"(a), "l"(b), "r"(add));                                                   \
    }                                                                                             \
    __device__ __forceinline__ static void registers(float (&c)[columns],                         \
                                                     const std::uint32_t (&a)[4],                 \
                                                     std::uint64_t b, int add) {                  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5 ", 0;\n"                              \
                   "wgmma.mma_async.sync.aligned.m64n" #width "k16.f32." name "." name            \
                   " {" WGMMA_NAMES_##columns "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3           \
                   "}, %" #o4 ", p, 1, 1, 1;\n}\n"                                                \
                   : WGMMA_LIST_##columns(c)                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));               \
    }                                                                                             \
  };
#define WGMMA(width, columns, o0, o1, o2, o3, o4, o5)                          \
  WGMMA_OF(__half, "f16", width, columns, o0, o1, o2, o3, o4, o5)              \
  WGMMA_OF(__nv_bfloat16, "bf16", width, columns, o0, o1, o2, o3, o4, o5)

WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
WGMMA(80, 40, 40, 41, 42, 43, 44, 45)
WGMMA(96, 48, 48, 49, 50, 51, 52, 53)
WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
WGMMA(144, 72, 72, 73, 74, 75, 76, 77)
WGMMA(160, 80, 80, 81, 82, 83, 84, 85)
WGMMA(176, 88, 88, 89, 90, 91, 92, 93)
WGMMA(256, 128, 128, 129, 130, 131, 132, 133)

#undef WGMMA
#undef WGMMA_OF
#undef WGMMA_LIST_8
#undef WGMMA_NAMES_8
#undef WGMMA_LIST_16
#undef WGMMA_NAMES_16
#undef WGMMA_LIST_24
#undef WGMMA_NAMES_24
#undef WGMMA_LIST_32
#undef WGMMA_NAMES_32
#undef WGMMA_LIST_40
#undef WGMMA_NAMES_40
#undef WGMMA_LIST_48
#undef WGMMA_NAMES_48
#undef WGMMA_LIST_56
#undef WGMMA_NAMES_56
#undef WGMMA_LIST_64
#undef WGMMA_NAMES_64
#undef WGMMA_LIST_72
#undef WGMMA_NAMES_72
#undef WGMMA_LIST_80
#undef WGMMA_NAMES_80
#undef WGMMA_LIST_88
#undef WGMMA_NAMES_88
#undef WGMMA_LIST_96
#undef WGMMA_NAMES_96
#undef WGMMA_LIST_104
#undef WGMMA_NAMES_104
#undef WGMMA_LIST_112
#undef WGMMA_NAMES_112
#undef WGMMA_LIST_120
#undef WGMMA_NAMES_120
#undef WGMMA_LIST_128
#undef WGMMA_NAMES_128
#undef WGMMA_C8
// clang-format on

}  // namespace stream_cqsa::cuda
