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

// Rows `row` and row + 8 of one head, as a thread holds them.
template <DataType kType>
class Output {
 public:
  Output() = default;
  __device__ __forceinline__ Output(const ForwardProblem& p, int batch, int head, int row)
      : row_(row),
        out_(static_cast<char*>(p.out) +
             2 * (batch * p.out_stride.batch + head * p.out_stride.head + row * p.out_stride.row +
                  8 * (threadIdx.x % 4))),
        lse_((int64_t{batch} * p.heads_q + head) * p.seq_q + row) {}

  // Column 8 j + 2 (lane % 4) + i of row r is o[4 j + 2 r + i] * norm[r]; 0 where norm is 0,
  // whatever o holds.
  template <int kRegisters>
  __device__ __forceinline__ void store(const ForwardProblem& p, float (&o)[kRegisters],
                                        const float (&norm)[2]) const {
    if (__any_sync(~0u, norm[0] == 0.0f || norm[1] == 0.0f)) {
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) o[i] = norm[i / 2 % 2] == 0.0f ? 0.0f : o[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      char* target = out_ + 16 * r * p.out_stride.row;
      const int columns = row_ + 8 * r < p.seq_q ? p.head_dim_v - 8 * (threadIdx.x % 4) : 0;
#pragma unroll
      for (int group = 0; group < kRegisters / 16; ++group) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* pair = &o[4 * (4 * group + j) + 2 * r];
          words[j] = ptx::pack<kType>(pair[0] * norm[r], pair[1] * norm[r]);
        }
        transpose_quad(words);
        if (32 * group < columns) {
          *reinterpret_cast<uint4*>(target + 64 * group) =
              uint4{words[0], words[1], words[2], words[3]};
        }
      }
    }
  }

  __device__ __forceinline__ void store_lse(const ForwardProblem& p, const float (&lse)[2]) const {
    if (p.lse == nullptr || threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row_ + 8 * r < p.seq_q) p.lse[lse_ + 8 * r] = lse[r];
    }
  }

 private:
  int row_;
  char* out_;
  int64_t lse_;
};

}  // namespace flash2::sm90
