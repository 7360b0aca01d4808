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

// Where a tile's dQ comes as its transpose: tiles of 80 rows, in each 64 columns of dQ after the
// other 64, and of these the accumulators of 16 columns x 8 rows, rows first.
struct TransposedSums {
  static constexpr int kRows = 80, kColumns = 128;
  const float* head;

  // Of rows [row0, row0 + 8), columns 16 part to 16 part + 15: (row 2 q, column g), (row 2 q + 1,
  // same), (row 2 q, column g + 8), (row 2 q + 1, same) for q = lane % 4, g = lane / 4.
  __device__ __forceinline__ float4 load(int row0, int part, int lane) const {
    const float* tile = head + int64_t{row0 / kRows} * (kRows * kColumns);
    const float* block = tile + part * (16 * kRows) + row0 % kRows / 8 * 128;
    return __ldcg(reinterpret_cast<const float4*>(block) + lane);
  }
};

}  // namespace flash2
