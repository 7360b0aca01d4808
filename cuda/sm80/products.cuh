// Matrix products of one warp, from fragments that are loaded one step ahead.
#pragma once

#include <cstdint>

#include "ptx/mma.cuh"

namespace flash2::sm80 {

// c += A B, with kM blocks of 16 rows, kN of 16 columns, kK of 16 terms. load_a(k, fragments) and
// load_b(k, n, fragments of two blocks of 8 columns).
template <DataType kType, int kM, int kN, int kK, class LoadA, class LoadB>
__device__ __forceinline__ void multiply(float (&c)[kM][2 * kN][4], LoadA load_a, LoadB load_b) {
  uint32_t a[2][kM][4], b[2][4];
  load_a(0, a[0]);
  load_b(0, 0, b[0]);
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int step = k * kN + n, next = step + 1;
      if (next < kK * kN) {
        load_b(next / kN, next % kN, b[next % 2]);
        if (next % kN == 0) load_a(next / kN, a[(k + 1) % 2]);
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_16x8x16<kType>(c[m][2 * n], a[k % 2][m], b[step % 2][0], b[step % 2][1]);
        ptx::mma_16x8x16<kType>(c[m][2 * n + 1], a[k % 2][m], b[step % 2][2], b[step % 2][3]);
      }
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&c)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
}

}  // namespace flash2::sm80
