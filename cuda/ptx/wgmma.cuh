// Inline PTX of compute capability 9.0a: matrix products of a warpgroup (128 threads). PTX ISA
// 9.7.15, wgmma.
//
// Registers (warp w of the group, g = lane / 4, q = lane % 4):
//   D, 64 x N floats:   d[4 j + 2 r + i] = (row 16 w + 8 r + g, column 8 j + 2 q + i)
//   A, 64 x 16, 4 words of two: (row g, columns 2q 2q+1), (row g+8, same), (row g, +8), (g+8, +8)
// So the D of two adjacent n8 blocks, packed in order, is the A of one k16 step, as with mma.
//
// Operands in shared memory are panels of 64 columns, swizzled as TMA does it (tma.cuh): rows of
// 128 bytes, 16-byte chunk c of row r at chunk c ^ (r % 8), each panel on a multiple of 1024.
#pragma once

#include <cstdint>

#include "problem.h"

namespace flash2::ptx {

// Describes a swizzled operand. Rows step by 128 bytes, groups of eight by 1024.
//   K-major (an operand as in a b^T: rows are rows of A or columns of B): `panel_bytes` is
//   ignored;
//     the next 16 of k lie 32 bytes on, the next 64 in the next panel.
//   MN-major (transposed: rows are k): `panel_bytes` leads to the next 64 rows of A or columns
//     of B; the next 16 of k lie 2048 bytes on.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t panel_bytes = 16) {
  constexpr uint64_t kGroupBytes = 1024, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | uint64_t{panel_bytes >> 4} << 16 | kGroupBytes >> 4 << 32 |
         kSwizzle128 << 62;
}

// The same operand `bytes` further on. Only the low word changes, so one addition does it; the
// address must stay below 2^18, which shared memory does.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Before the first product, and wherever registers of a product were touched or a loop was passed
// since the last: without it the assembler serialises (C7514) or injects one (C7519).
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads of an accumulator above the wait that makes it valid.
template <int kRegisters>
__device__ __forceinline__ void pin(float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// --- One wrapper per width. A statement needs its operands spelled out: "%0, ..., %31" and
// "+f"(d[0]), ..., "+f"(d[31]) for 32 registers, from groups of eight.
#define FLASH2_N8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FLASH2_N16 FLASH2_N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASH2_N24 FLASH2_N16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FLASH2_N32 FLASH2_N24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASH2_N40 FLASH2_N32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FLASH2_N48 FLASH2_N40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FLASH2_N56 FLASH2_N48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FLASH2_N64 FLASH2_N56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASH2_N72 FLASH2_N64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FLASH2_N80 FLASH2_N72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FLASH2_N88 FLASH2_N80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FLASH2_N96 FLASH2_N88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FLASH2_N104 FLASH2_N96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define FLASH2_N112 FLASH2_N104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define FLASH2_N120 FLASH2_N112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define FLASH2_N128 FLASH2_N120 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define FLASH2_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLASH2_D16(i) FLASH2_D8(i), FLASH2_D8(i + 8)
#define FLASH2_D24(i) FLASH2_D16(i), FLASH2_D8(i + 16)
#define FLASH2_D32(i) FLASH2_D16(i), FLASH2_D16(i + 16)
#define FLASH2_D40(i) FLASH2_D32(i), FLASH2_D8(i + 32)
#define FLASH2_D48(i) FLASH2_D32(i), FLASH2_D16(i + 32)
#define FLASH2_D56(i) FLASH2_D32(i), FLASH2_D24(i + 32)
#define FLASH2_D64(i) FLASH2_D32(i), FLASH2_D32(i + 32)
#define FLASH2_D80(i) FLASH2_D64(i), FLASH2_D16(i + 64)
#define FLASH2_D88(i) FLASH2_D64(i), FLASH2_D24(i + 64)
#define FLASH2_D96(i) FLASH2_D64(i), FLASH2_D32(i + 64)
#define FLASH2_D128(i) FLASH2_D64(i), FLASH2_D64(i + 64)

#define FLASH2_WGMMA_SS(type, n, registers, a, b, p, ta, tb)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p                                         \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                 \
               " {" FLASH2_N##registers "}, %" #a ", %" #b ", p, 1, 1, %" #ta ", %" #tb ";\n}" \
               : FLASH2_D##registers(0)                                                        \
               : "l"(a_), "l"(b_), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))
#define FLASH2_WGMMA_RS(type, n, registers, a0, a1, a2, a3, b, p, tb)                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p                                      \
               ", 0;\n"                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type              \
               " {" FLASH2_N##registers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b \
                                        ", p, 1, 1, %" #tb ";\n}"                           \
               : FLASH2_D##registers(0)                                                     \
               : "r"(a_[0]), "r"(a_[1]), "r"(a_[2]), "r"(a_[3]), "l"(b_), "r"(accumulate),  \
                 "n"(kTransposeB))

template <int kRegisters>
struct Wgmma;

// r0 to r6: the numbers of the operands after the accumulator's.
#define FLASH2_WGMMA(n, registers, r0, r1, r2, r3, r4, r5, r6)                                 \
  template <>                                                                                  \
  struct Wgmma<registers> {                                                                    \
    template <DataType kType, int kTransposeA, int kTransposeB>                                \
    static __device__ __forceinline__ void ss(float (&d)[registers], uint64_t a_, uint64_t b_, \
                                              int accumulate) {                                \
      if constexpr (kType == DataType::kBFloat16) {                                            \
        FLASH2_WGMMA_SS("bf16", n, registers, r0, r1, r2, r3, r4);                             \
      } else {                                                                                 \
        FLASH2_WGMMA_SS("f16", n, registers, r0, r1, r2, r3, r4);                              \
      }                                                                                        \
    }                                                                                          \
    template <DataType kType, int kTransposeB>                                                 \
    static __device__ __forceinline__ void rs(float (&d)[registers], const uint32_t (&a_)[4],  \
                                              uint64_t b_, int accumulate) {                   \
      if constexpr (kType == DataType::kBFloat16) {                                            \
        FLASH2_WGMMA_RS("bf16", n, registers, r0, r1, r2, r3, r4, r5, r6);                     \
      } else {                                                                                 \
        FLASH2_WGMMA_RS("f16", n, registers, r0, r1, r2, r3, r4, r5, r6);                      \
      }                                                                                        \
    }                                                                                          \
  };
FLASH2_WGMMA(48, 24, 24, 25, 26, 27, 28, 29, 30)
FLASH2_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
FLASH2_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
FLASH2_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
FLASH2_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
FLASH2_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
FLASH2_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
FLASH2_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
FLASH2_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
FLASH2_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

// d = a b + (accumulate ? d : 0), 64 x N x 16 with N = 2 kRegisters; a and b are descriptors.
// kTransposeA, kTransposeB: that operand is MN-major.
template <DataType kType, bool kTransposeA, bool kTransposeB, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b,
                                      bool accumulate) {
  Wgmma<kRegisters>::template ss<kType, kTransposeA, kTransposeB>(d, a, b, accumulate);
}

// The same with a in registers.
template <DataType kType, bool kTransposeB, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  Wgmma<kRegisters>::template rs<kType, kTransposeB>(d, a, b, accumulate);
}

#undef FLASH2_WGMMA
#undef FLASH2_WGMMA_RS
#undef FLASH2_WGMMA_SS

}  // namespace flash2::ptx
