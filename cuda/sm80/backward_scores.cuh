// What happens to a block of transposed scores between K Q^T and P^T: the backward's counterpart
// of scores.cuh.
//
// A thread holds, of each 16 x 8 block (m, j): s[m][j][2 r + i] = key kStride m + 8 r + lane / 4,
// query 8 j + 2 (lane % 4) + i. Keys and queries below count inside the warp's block.
#pragma once

#include <cstdint>

#include "softmax.cuh"

namespace flash2::sm80 {

// Keys at or past limit(query) if kUpper, else those below it, get the score `masked`.
template <int kStride, bool kUpper, int kM, int kN, class Limit>
__device__ __forceinline__ void mask_keys(float (&s)[kM][kN][4], float masked, Limit limit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kN; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int bound = limit(8 * j + lane % 4 * 2 + i) - lane / 4;
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int key = kStride * m + 8 * r;
          if (kUpper ? key >= bound : key < bound) s[m][j][2 * r + i] = masked;
        }
    }
}

// Rules out the queries whose segment id is not the key's. The first `rows` and `keys` ids exist.
template <int kStride, int kM, int kN>
__device__ __forceinline__ void mask_key_ids(float (&s)[kM][kN][4], const int* query_ids, int rows,
                                             const int* key_ids, int keys) {
  const int lane = threadIdx.x % 32;
  int ids[2 * kM];
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
    const int key = kStride * (r / 2) + 8 * (r % 2) + lane / 4;
    ids[r] = key < keys ? key_ids[key] : 0;
  }
#pragma unroll
  for (int j = 0; j < kN; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 8 * j + lane % 4 * 2 + i;
      const int id = row < rows ? query_ids[row] : 0;
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r) {
        if (id != ids[r]) s[r / 2][j][r % 2 * 2 + i] = -INFINITY;
      }
    }
}

}  // namespace flash2::sm80
