// From the registers of a warp to the arrays: out and logsumexp.
//
// Straight to global memory: shared memory would need a buffer that the tiles of 128 and 256 have
// no room for, and waits. A quad of lanes exchanges its words first, so that each lane has 16
// bytes of a row and a quad 64.
#pragma once

#include <cstdint>

#include "problem.h"
#include "ptx/common.cuh"

namespace flash2::sm90 {

// Word i of lane q becomes word q of lane i, inside each quad.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? w[i] : w[i | bit], bit);
      (upper ? w[i] : w[i | bit]) = got;
    }
  }
}

// Rows `row` and row + 8 of this thread, whose column 8 j + 2 (lane % 4) + i of row r is
// o[4 j + 2 r + i], times norm[r].
template <DataType kType, int kRegisters>
__device__ __forceinline__ void store_rows(const ForwardProblem& p, int batch, int head, int row,
                                           const float (&o)[kRegisters], const float (&norm)[2]) {
  const int lane = threadIdx.x % 4;
  char* out = static_cast<char*>(p.out) +
              2 * (batch * p.out_stride.batch + head * p.out_stride.head + 8 * lane);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    char* target = out + 2 * ((row + int64_t{8} * r) * p.out_stride.row);
    const bool exists = row + 8 * r < p.seq_q;
#pragma unroll
    for (int group = 0; group < kRegisters / 16; ++group) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = &o[4 * (4 * group + j) + 2 * r];
        const float low = norm[r] == 0.0f ? 0.0f : pair[0] * norm[r];
        const float high = norm[r] == 0.0f ? 0.0f : pair[1] * norm[r];
        words[j] = ptx::pack<kType>(low, high);
      }
      transpose_quad(words);
      if (exists && 32 * group + 8 * lane < p.head_dim_v) {
        *reinterpret_cast<uint4*>(target + 64 * group) =
            uint4{words[0], words[1], words[2], words[3]};
      }
    }
  }
}

__device__ __forceinline__ void store_lse(const ForwardProblem& p, int batch, int head, int row,
                                          const float (&lse)[2]) {
  if (p.lse == nullptr || threadIdx.x % 4 != 0) return;
  float* target = p.lse + (int64_t{batch} * p.heads_q + head) * p.seq_q;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r < p.seq_q) target[row + 8 * r] = lse[r];
  }
}

}  // namespace flash2::sm90
