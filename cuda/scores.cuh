// What happens to a block of scores between Q K^T and the softmax, where accumulators lie as those
// of mma.m16n8k16; of wgmma they lie so for each warp.
//
// A thread holds, of each 16 x 8 block (m, j): s[m][j][2 r + i] = row 16 m + 8 r + lane / 4,
// column 8 j + 2 (lane % 4) + i. Rows and columns below count inside the warp's block.
#pragma once

#include <cstdint>

#include "softmax.cuh"

namespace flash2 {

// Rules out columns at or past limit(row) if kUpper, else those below it.
template <int kM, int kColumns, bool kUpper, class Limit>
__device__ __forceinline__ void mask_columns(float (&s)[kM][kColumns / 8][4], Limit limit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
    const int bound = limit(8 * r + lane / 4) - lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (kUpper ? 8 * j + i >= bound : 8 * j + i < bound) {
          s[r / 2][j][r % 2 * 2 + i] = -INFINITY;
        }
      }
  }
}

// Rules out the keys whose segment id is not the row's. The first `rows` and `keys` ids exist.
template <int kM, int kColumns>
__device__ __forceinline__ void mask_ids(float (&s)[kM][kColumns / 8][4], const int* query_ids,
                                         int rows, const int* key_ids, int keys) {
  const int lane = threadIdx.x % 32;
  int row_ids[2 * kM];
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
    const int row = 8 * r + lane / 4;
    row_ids[r] = row < rows ? query_ids[row] : 0;
  }
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * j + lane % 4 * 2 + i;
      const int id = column < keys ? key_ids[column] : 0;
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r) {
        if (id != row_ids[r]) s[r / 2][j][r % 2 * 2 + i] = -INFINITY;
      }
    }
}

// score = scale * q.k, capped, minus slope * |i - j|. `distance` is i - j of row 0 and column 0.
template <int kM, int kColumns>
__device__ __forceinline__ void modify_scores(float (&s)[kM][kColumns / 8][4], float scale,
                                              float cap, float slope, int distance) {
  const int lane = threadIdx.x % 32;
  float* all = &s[0][0][0];
#pragma unroll
  for (int e = 0; e < kM * kColumns / 2; ++e) all[e] *= scale;
  if (cap > 0.0f) {
#pragma unroll
    for (int e = 0; e < kM * kColumns / 2; ++e) all[e] = cap_score(all[e], cap);
  }
  if (slope != 0.0f) {
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      const float first = static_cast<float>(distance + 8 * r + lane / 4 - lane % 4 * 2);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[r / 2][j][r % 2 * 2 + i];
          x = fmaf(-slope, fabsf(first - static_cast<float>(8 * j + i)), x);
        }
    }
  }
}

}  // namespace flash2
