// From the registers of a warp to the arrays: out and logsumexp.
//
// Straight to global memory: shared memory would need a buffer that the tiles of 128 and 256 have
// no room for, and waits. A quad of lanes exchanges its words first, so that each lane has 16
// bytes of a row and a quad 64.
#pragma once

#include <cstdint>

#include "problem.h"
#include "ptx/common.cuh"
#include "sm90/kernels.h"
#include "sm90/work.cuh"

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

// Where row `row` of a tile belongs: positions follow each other, of each the heads of the pack.
template <bool kPacks>
struct RowPlace {
  int position;
  int head;
  int heads;  // heads at or past it belong to no pack of this key head

  __device__ __forceinline__ RowPlace(const ForwardSchedule& schedule, const Work& work, int row)
      : position(work.row0 + row), head(work.head), heads(work.head + 1) {
    if constexpr (kPacks) {
      position = work.row0 + (row >> schedule.pack_shift);
      head += row & ((1 << schedule.pack_shift) - 1);
      heads = (work.head_kv + 1) * schedule.group;
    }
  }
  __device__ __forceinline__ bool exists(const ForwardProblem& p) const {
    return head < heads && position < p.seq_q;
  }
};

// Rows `row` and row + 8 of a tile, as a thread holds them.
template <DataType kType, bool kPacks>
class Output {
 public:
  Output() = default;
  __device__ __forceinline__ Output(const ForwardProblem& p, const ForwardSchedule& schedule,
                                    const Work& work, int row) {
    const RowPlace<kPacks> place(schedule, work, row), other(schedule, work, row + 8);
    left_ = p.seq_q - place.position;
    if (kPacks) {
      left_ = place.exists(p) + 8 * other.exists(p);
    }
    out_ = static_cast<char*>(p.out) +
           2 * (work.batch * p.out_stride.batch + place.head * p.out_stride.head +
                place.position * p.out_stride.row + 8 * (threadIdx.x % 4));
    lse_ = (int64_t{work.batch} * p.heads_q + place.head) * p.seq_q + place.position;
  }

  // Column 8 j + 2 (lane % 4) + i of row r is o[4 j + 2 r + i] * norm[r]; 0 where norm is 0,
  // whatever o holds.
  template <int kRegisters>
  __device__ __forceinline__ void store(const ForwardProblem& p, const ForwardSchedule& schedule,
                                        float (&o)[kRegisters], const float (&norm)[2]) const {
    if (__any_sync(~0u, norm[0] == 0.0f || norm[1] == 0.0f)) {
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) o[i] = norm[i / 2 % 2] == 0.0f ? 0.0f : o[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      char* target = out_ + 2 * r * to_other_row(schedule, p.out_stride.row, p.out_stride.head);
      const int columns = 8 * r < left_ ? p.head_dim_v - 8 * (threadIdx.x % 4) : 0;
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

  __device__ __forceinline__ void store_lse(const ForwardProblem& p,
                                            const ForwardSchedule& schedule,
                                            const float (&lse)[2]) const {
    if (p.lse == nullptr || threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (8 * r < left_) p.lse[lse_ + r * to_other_row(schedule, 1, p.seq_q)] = lse[r];
    }
  }

 private:
  // 8 rows of the tile on is 8 heads on, or as many positions as 8 rows hold.
  static __device__ __forceinline__ int64_t to_other_row(const ForwardSchedule& schedule,
                                                         int64_t row, int64_t head) {
    if (!kPacks) return 8 * row;
    return schedule.pack_shift > 3 ? 8 * head : (8 >> schedule.pack_shift) * row;
  }

  int left_;  // rows from the first on that exist; 1 and 9 stand for all that matters
  char* out_;
  int64_t lse_;
};

}  // namespace flash2::sm90
