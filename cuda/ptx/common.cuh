// Inline PTX that every family uses: one instruction, one function.
#pragma once

#include <cstdint>

#include "problem.h"

namespace flash2::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same value, of which the compiler no longer knows where it came from: what is derived from
// it is computed where it is needed and not kept in registers across a loop.
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ __forceinline__ int64_t opaque_wide(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

// Tests build with JAX_FLASH2_PERTURB: warps then sleep for up to 2 us, by the clock, wherever
// they wait for others, so that what depends on their order shows. Not where single lanes arrive:
// a sleep in a branch makes the assembler serialise wgmma (C7520).
__device__ __forceinline__ void perturb() {
#ifdef FLASH2_PERTURB
  uint32_t clock;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(clock));
  const uint32_t noise = (clock + threadIdx.x / 32 * 977 + blockIdx.x * 131) * 2654435761u;
  __nanosleep(__shfl_sync(__activemask(), noise >> 21, __ffs(__activemask()) - 1));
#endif
}

// 2^x, flushing subnormals: without .ftz two more instructions would rescale them.
// PTX ISA 9.7.3, ex2.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Likewise, within one unit in the last place; of inf it is 0. PTX ISA 9.7.3, rcp.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Likewise; of 0 it is -inf. PTX ISA 9.7.3, lg2.
__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A word of x's bytes by number, the lowest first in the selector; 8 more: of that byte the top
// bit, eight times. PTX ISA 9.7.9, prmt, whose sign mode __byte_perm lacks.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t x, uint32_t selector) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "r"(selector));
  return y;
}

// Two floats rounded to nearest even and packed, `low` in the low half. PTX ISA 9.7.9, cvt.
template <DataType kType>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (kType == DataType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// As pack<kFloat16>, of numbers that are not negative.
__device__ __forceinline__ uint32_t pack_positive(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The two numbers of a packed word. PTX ISA 9.7.9, cvt; a bfloat16 is a float's upper half.
template <DataType kType>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  if constexpr (kType == DataType::kBFloat16) {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
  } else {
    float2 x;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(x.x), "=f"(x.y)
        : "r"(packed));
    return x;
  }
}

// PTX ISA 9.7.9, st.shared.
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_2(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(value))
               : "memory");
}

// PTX ISA 9.7.9, ld.shared.
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ float2 load_shared_8(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_16(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_shared_8(uint32_t address, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}

// Adds to global memory, in no order. PTX ISA 9.7.13, red.
__device__ __forceinline__ void add_global(float* address, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void add_global_4(float* address, const float (&v)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address),
               "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}
#endif

// PTX ISA 9.7.9, ld.acquire.
__device__ __forceinline__ int load_acquire(const int* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// PTX ISA 9.7.13, red.release.
__device__ __forceinline__ void add_release(int* address, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

}  // namespace flash2::ptx
