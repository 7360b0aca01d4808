// The float32 sums of dQ = dS K in the backward's workspace.
//
// Many blocks add to them, so they lie in the order in which the threads hold them: a warp's
// accumulators of one 16 x 8 block of mma.m16n8k16 are 128 floats in a row. Blocks go by strips of
// 16 rows, within a strip by columns. Where one instruction adds four floats (9.0) a lane's four
// are neighbours, else the lanes' are.
#pragma once

#include <cstdint>

#include "ptx/common.cuh"

namespace flash2 {

struct DquerySums {
  float* block;  // of the strip and columns that are meant

  __device__ __forceinline__ void add(int lane, const float (&c)[4]) const {
#if __CUDA_ARCH__ >= 900
    ptx::add_global_4(block + 4 * lane, c);
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::add_global(block + 32 * i + lane, c[i]);
#endif
  }

  // Past L1, since other multiprocessors have added.
  __device__ __forceinline__ float4 load(int lane) const {
#if __CUDA_ARCH__ >= 900
    return __ldcg(reinterpret_cast<const float4*>(block) + lane);
#else
    return {__ldcg(block + lane), __ldcg(block + 32 + lane), __ldcg(block + 64 + lane),
            __ldcg(block + 96 + lane)};
#endif
  }
};

}  // namespace flash2
