// From the registers of a warp to the arrays: out and logsumexp.
//
// Straight to global memory: shared memory would need a buffer that the tiles of 128 and 256 have
// no room for, and waits. Lanes exchange words first, two or four of them, so that each has 8 or
// 16 bytes of a row and a quad 32, a sector, or 64.
#pragma once

#include <cstdint>

#include "problem.h"
#include "ptx/common.cuh"
#include "sm90/kernels.h"
#include "sm90/work.cuh"

namespace flash2::sm90 {

// Word i of lane q becomes word q of lane i, inside each kLanes of a quad.
template <int kLanes>
__device__ __forceinline__ void transpose(uint32_t (&w)[kLanes]) {
#pragma unroll
  for (int bit = 1; bit < kLanes; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
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

// Rows `row` and row + 8 of a tile, as a thread holds them. kLanes exchange words.
template <DataType kType, bool kPacks, int kLanes>
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
    out_ = 2 * (work.batch * p.out_stride.batch + place.head * p.out_stride.head +
                place.position * p.out_stride.row + first_column());
    lse_ = (int64_t{work.batch} * p.heads_q + place.head) * p.seq_q + place.position;
    if constexpr (kPacks) {
      // Here, beside the products, and not where they are used, as the compiler would have it. For
      // three consumers, which do not pack, it would spill.
      out_ = ptx::opaque_wide(out_);
      lse_ = ptx::opaque_wide(lse_);
    }
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
      char* target = static_cast<char*>(p.out) + out_ +
                     2 * r * to_other_row(schedule, p.out_stride.row, p.out_stride.head);
      const int columns = 8 * r < left_ ? p.head_dim_v - first_column() : 0;
#pragma unroll
      for (int block = 0; block < kRegisters / 4; block += kLanes) {
        uint32_t words[kLanes];
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const float* pair = &o[4 * (block + j) + 2 * r];
          words[j] = ptx::pack<kType>(pair[0] * norm[r], pair[1] * norm[r]);
        }
        transpose(words);
        if (8 * block < columns) {
          if constexpr (kLanes == 2) {
            *reinterpret_cast<uint2*>(target + 16 * block) = uint2{words[0], words[1]};
          } else {
            *reinterpret_cast<uint4*>(target + 16 * block) =
                uint4{words[0], words[1], words[2], words[3]};
          }
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
  static_assert(kLanes == 2 || kLanes == 4);

  // What the lane has of the first kLanes blocks of columns: 2 kLanes of one of them.
  static __device__ __forceinline__ int first_column() {
    const int lane = threadIdx.x % 4;
    return 8 * (lane % kLanes) + 2 * (lane / kLanes * kLanes);
  }

  // 8 rows of the tile on is 8 heads on, or as many positions as 8 rows hold.
  static __device__ __forceinline__ int64_t to_other_row(const ForwardSchedule& schedule,
                                                         int64_t row, int64_t head) {
    if (!kPacks) return 8 * row;
    return schedule.pack_shift > 3 ? 8 * head : (8 >> schedule.pack_shift) * row;
  }

  int left_;  // rows from the first on that exist; 1 and 9 stand for all that matters
  int64_t out_;
  int64_t lse_;
};

}  // namespace flash2::sm90
