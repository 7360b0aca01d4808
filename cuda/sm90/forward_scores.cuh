// What becomes of the scores of a thread's two rows between the products: masks, the online
// softmax, and packing into the A operand of P V.
#pragma once

#include <cstdint>

#include "mask.cuh"
#include "problem.h"
#include "ptx/common.cuh"
#include "scores.cuh"
#include "sm90/kernels.h"
#include "sm90/output.cuh"
#include "sm90/tiles.h"
#include "sm90/work.cuh"
#include "softmax.cuh"

namespace flash2::sm90 {

// Scores of a thread: s[4 j + 2 r + i] = row 8 r + lane / 4 of the warp's 16, column
// 8 j + 2 (lane % 4) + i. O likewise.
template <int kTile, DataType kType>
struct RowScores {
  static constexpr ForwardTile kT = kForwardTiles[kTile];
  static constexpr int kD = kT.head_dim, kTileKv = kT.tile_kv;
  using Scores = float[kTileKv / 2];

  OnlineSoftmax<2> online;
  float factor;
  float decay[2];                // what O has yet to be multiplied by
  bool decayed;                  // whether some row of the warp has to
  int row_begin[2], row_end[2];  // keys that the thread's rows see
  int warp_begin, warp_end;      // keys that all rows of the warp see

  // `row` is the first of the two in the tile.
  __device__ __forceinline__ void start(const ForwardProblem& p, const ForwardSchedule& schedule,
                                        const Work& work, int row) {
    online = OnlineSoftmax<2>();
    factor = score_factor(work.scale);
    if constexpr (kT.masked) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int position = RowPlace<kT.packs()>(schedule, work, row + 8 * r).position;
        const Interval keys = work.visibility.row(p, position);
        row_begin[r] = keys.begin;
        row_end[r] = keys.end;
      }
      warp_begin = __shfl_sync(~0u, row_begin[1], 31);  // both ends rise with the row
      warp_end = __shfl_sync(~0u, row_end[0], 0);
    } else {
      row_end[0] = row_end[1] = warp_end = p.seq_kv;
    }
  }

  // Masks a tile's first block. True if no row of the warp sees its upper half, as on a diagonal
  // the rows of the upper consumer: then only the lower half is worked on.
  __device__ __forceinline__ bool mask_first(Scores& s, int first_key) {
    bool half = false;
    if (kT.packs()) half = __shfl_sync(~0u, row_end[1], 31) <= first_key + kTileKv / 2;
    half ? mask<kTileKv / 2>(s, first_key) : mask<kTileKv>(s, first_key);
    return half;
  }

  // The first kColumns of a block.
  template <int kColumns>
  __device__ __forceinline__ void mask(Scores& s, int first_key) {
    auto& blocks = reinterpret_cast<float (&)[1][kColumns / 8][4]>(s);
    if (first_key + kColumns > warp_end) {
      mask_columns<1, kColumns, true>(blocks, [&](int r) { return row_end[r / 8] - first_key; });
    }
    if constexpr (kT.masked) {
      if (first_key < warp_begin) {
        mask_columns<1, kColumns, false>(blocks,
                                         [&](int r) { return row_begin[r / 8] - first_key; });
      }
    }
  }

  // Scores become exponentials, where `half` says so those of the lower half of the columns alone,
  // and the others 0. `between` is called with a sum that depends on the first split / 8 of them.
  template <class Between>
  __device__ __forceinline__ void exponentiate(Scores& s, Between between, bool half = false) {
    constexpr int kBlocks = kTileKv / 8, kHalf = kBlocks / 2;
    static_assert(kBlocks * kT.split / 8 < kHalf);
    float largest[2] = {-INFINITY, -INFINITY};
    const auto maximum = [&](int begin, int end) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float a = s[4 * begin + 2 * r], b = s[4 * begin + 2 * r + 1];
#pragma unroll
        for (int j = begin + 1; j < end; ++j) {
          a = fmaxf(a, s[4 * j + 2 * r]);
          b = fmaxf(b, s[4 * j + 2 * r + 1]);
        }
        largest[r] = fmaxf(largest[r], fmaxf(a, b));
      }
    };
    maximum(0, kHalf);
    if (!half) maximum(kHalf, kBlocks);
    decayed = false;
    online.raise(largest, factor, [&](int r, float d) {
      decay[r] = d;
      decayed = true;
    });
    float base[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int r = 0; r < 2; ++r) base[r] = online.base(r, factor);
    const auto exponentials = [&](int begin, int end) {
#pragma unroll
      for (int j = begin; j < end; ++j) {
        if (j == kBlocks * kT.split / 8) between(sum[0] + sum[1]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float* pair = &s[4 * j + 2 * r];
          pair[0] = ptx::exp2(fmaf(pair[0], factor, -base[r]));
          pair[1] = ptx::exp2(fmaf(pair[1], factor, -base[r]));
          online.sum[r] += pair[0];
          sum[r] += pair[1];
        }
      }
    };
    exponentials(0, kHalf);
    if (!half) {
      exponentials(kHalf, kBlocks);
    } else {
#pragma unroll
      for (int i = 4 * kHalf; i < 4 * kBlocks; ++i) s[i] = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) online.sum[r] += sum[r];
  }

  __device__ __forceinline__ void rescale(float (&o)[kD / 2]) {
    if (!decayed) return;
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[4 * j + i] *= decay[i / 2];
    ptx::pin(o);
  }

  __device__ __forceinline__ static void pack(uint32_t (&probabilities)[kTileKv / 16][4],
                                              const Scores& s) {
#pragma unroll
    for (int i = 0; i < kTileKv / 4; ++i) {
      probabilities[i / 4][i % 4] = ptx::pack<kType>(s[2 * i], s[2 * i + 1]);
    }
  }
};

}  // namespace flash2::sm90
