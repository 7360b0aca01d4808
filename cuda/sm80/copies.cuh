// Copies between global memory and swizzled shared memory.
//
// A tile in shared memory is a row of panels of 64 columns: row r of a panel has 128 bytes, its
// 16-byte chunk c lies at chunk c ^ (r % 8). So the eight rows that one ldmatrix phase reads, and
// the eight chunks that eight threads write, lie in different banks.
#pragma once

#include <cstdint>

#include "ptx/common.cuh"
#include "ptx/mma.cuh"

namespace flash2::sm80 {

// Where chunk `chunk` of row `row` lies in a panel.
__device__ __forceinline__ uint32_t swizzle(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// kThreads threads copy kRows rows of kColumns 16-bit columns into panels of kPanelRows rows;
// eight neighbours share a row of a panel.
template <int kRows, int kColumns, int kPanelRows, int kThreads>
struct TileCopy {
  static constexpr int kPass = kThreads / 8;  // rows in one pass
  static_assert(kRows % kPass == 0);

  // Rows [first, first + kRows) of an operand with rows of `row_bytes`; rows at or past
  // first + `rows` and columns at or past `columns` become 0.
  static __device__ __forceinline__ void load(uint32_t shared, const char* global,
                                              int64_t row_bytes, int first, uint32_t thread,
                                              int rows, int columns) {
    const int row = thread / 8, chunk = thread % 8;
    global += (first + row) * row_bytes + chunk * 16;
    rows -= row;
    columns -= chunk * 8;
#pragma unroll
    for (int pass = 0; pass < kRows / kPass; ++pass) {
      const uint32_t target = shared + swizzle(row + pass * kPass, chunk);
#pragma unroll
      for (int panel = 0; panel < kColumns / 64; ++panel) {
        const bool inside = pass * kPass < rows && panel * 64 < columns;
        ptx::copy_async_16(target + panel * kPanelRows * 128, global + panel * 128,
                           inside ? 16 : 0);
      }
      global += row_bytes * kPass;
    }
  }

  // The way back, for rows below `rows` and columns below `columns`.
  static __device__ __forceinline__ void store(uint32_t shared, char* global, int64_t row_bytes,
                                               int first, uint32_t thread, int rows, int columns) {
    const int row = thread / 8, chunk = thread % 8;
    global += (first + row) * row_bytes + chunk * 16;
#pragma unroll
    for (int pass = 0; pass < kRows / kPass; ++pass) {
      const int r = row + pass * kPass;
#pragma unroll
      for (int panel = 0; panel < kColumns / 64; ++panel) {
        const uint4 words =
            ptx::load_shared_16(shared + panel * kPanelRows * 128 + swizzle(r, chunk));
        if (r < rows && panel * 64 + chunk * 8 < columns) {
          *reinterpret_cast<uint4*>(global + panel * 128) = words;
        }
      }
      global += row_bytes * kPass;
    }
  }
};

}  // namespace flash2::sm80
