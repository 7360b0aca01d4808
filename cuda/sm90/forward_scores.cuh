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
  static constexpr int kD = kT.head_dim, kTileKv = kT.tile_kv, kBlocks = kTileKv / 8;
  using Scores = float[kTileKv / 2];

  OnlineSoftmax<2> online;
  float factor;
  float gain;                    // of the soft cap
  float decay[2];                // what O has yet to be multiplied by
  bool decayed;                  // whether some row of the warp has to
  int row_begin[2], row_end[2];  // keys that the thread's rows see
  int warp_begin, warp_end;      // keys that all rows of the warp see

  // `row` is the first of the two in the tile.
  __device__ __forceinline__ void start(const ForwardProblem& p, const ForwardSchedule& schedule,
                                        const Work& work, int row) {
    online = OnlineSoftmax<2>();
    factor = score_factor(work.scale);
    if constexpr (kT.capped) {
      factor = 2.0f * kLog2E * p.soft_cap;
      gain = -2.0f * kLog2E * fabsf(work.scale) / p.soft_cap;
    }
    if constexpr (kT.masked) {
      const RowPlace<kT.packs()> places[2] = {{schedule, work, row}, {schedule, work, row + 8}};
      const int positions[2] = {places[0].position, places[1].position};
      work.bounds.find(p, positions, row_begin, row_end);
      if (p.row_keys) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const Interval keys = segment_keys_of(p, work.batch, positions[r]);
          row_begin[r] = max(row_begin[r], keys.begin);
          row_end[r] = min(row_end[r], keys.end);
        }
      }
      warp_begin = __shfl_sync(~0u, row_begin[1], 31);  // both ends rise with the row
      warp_end = __shfl_sync(~0u, row_end[0], 0);
    } else {
      row_end[0] = row_end[1] = warp_end = p.seq_kv;
    }
  }

  // With a soft cap c a score x becomes c tanh(x / c) = 2 c / (1 + exp(-2 x / c)) - c. The
  // fraction takes the raw score's place, 2 c its factor's, and who finishes a row sees to the
  // last term. Before masks, whose -inf would become a score.
  __device__ __forceinline__ void cap(Scores& s, int begin = 0, int end = kTileKv) {
    if constexpr (kT.capped) {
#pragma unroll
      for (int i = begin / 2; i < end / 2; ++i) {
        s[i] = ptx::reciprocal(1.0f + ptx::exp2(s[i] * gain));
      }
    }
  }

  // Rules out what the rows do not see of kColumns from `first_key` on; `s` begins with them.
  template <int kColumns>
  __device__ __forceinline__ void mask(float* s, int first_key) {
    auto& blocks = reinterpret_cast<float (&)[1][kColumns / 8][4]>(*s);
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

  // Scores become exponentials. `between` is called with a sum that depends on the first split / 8
  // of them.
  template <class Between>
  __device__ __forceinline__ void exponentiate(Scores& s, Between between) {
    constexpr int kEarly = kBlocks * kT.split / 8;
    float largest[2] = {-INFINITY, -INFINITY};
    find_largest(s, 0, kBlocks, largest);
    decayed = false;
    online.raise(largest, factor, [&](int r, float d) {
      decay[r] = d;
      decayed = true;
    });
    Sums sums(*this);
    sums.add(s, 0, kEarly);
    between(sums.odd[0] + sums.odd[1]);
    sums.add(s, kEarly, kBlocks);
    sums.finish();
  }

  // The same of a tile's first block, which it also masks. What lies above all keys that the
  // warp's rows see costs nothing, part by part: on a diagonal more than a third of the block.
  // Three consumers have no registers for it. `zero` is 0, but the compiler must not know: a plain
  // 0 it would write before it branches, thus to other registers than the score's, and then move
  // all of a block's scores to where the others are.
  template <class Between>
  __device__ __forceinline__ void exponentiate_first(Scores& s,
                                                     uint32_t (&probabilities)[kTileKv / 16][4],
                                                     int first_key, uint32_t zero,
                                                     Between between) {
    constexpr int kPart = kT.consumers == 3 ? kTileKv : kTileKv % 32 == 0 ? 32 : kTileKv / 2;
    constexpr int kParts = kTileKv / kPart;
    int seen = kTileKv;
    if (kT.masked && kParts > 1) seen = __shfl_sync(~0u, row_end[1], 31) - first_key;
    float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int begin = part * kPart;
      if (begin >= seen) continue;
      cap(s, begin, begin + kPart);
      mask<kPart>(&s[begin / 2], first_key + begin);
      find_largest(s, begin / 8, (begin + kPart) / 8, largest);
    }
    decayed = false;
    online.begin(largest);
    Sums sums(*this);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int begin = part * kPart;
      if (begin < seen) {
        sums.add(s, begin / 8, (begin + kPart) / 8);
        if constexpr (kT.ends_first()) pack(probabilities, s, begin, begin + kPart);
      } else if constexpr (kT.ends_first()) {
#pragma unroll
        for (int i = begin / 4; i < (begin + kPart) / 4; ++i) probabilities[i / 4][i % 4] = 0;
      } else {
#pragma unroll
        for (int i = begin / 2; i < (begin + kPart) / 2; ++i) s[i] = zero != 0 ? s[i] : 0.0f;
      }
      if (part == 0) between(sums.odd[0] + sums.odd[1]);
    }
    sums.finish();
  }

  __device__ __forceinline__ void rescale(float (&o)[kD / 2]) {
    if (!decayed) return;
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[4 * j + i] *= decay[i / 2];
    ptx::pin(o);
  }

  // Of columns [begin, end).
  __device__ __forceinline__ static void pack(uint32_t (&probabilities)[kTileKv / 16][4],
                                              const Scores& s, int begin = 0, int end = kTileKv) {
#pragma unroll
    for (int i = begin / 4; i < end / 4; ++i) {
      probabilities[i / 4][i % 4] = ptx::pack<kType>(s[2 * i], s[2 * i + 1]);
    }
  }

 private:
  // Makes exponentials of blocks of 8 columns; their sums run in two chains a row.
  struct Sums {
    RowScores& rows;
    float base[2], odd[2] = {0.0f, 0.0f};

    __device__ __forceinline__ explicit Sums(RowScores& scores) : rows(scores) {
#pragma unroll
      for (int r = 0; r < 2; ++r) base[r] = rows.online.base(r, rows.factor);
    }
    __device__ __forceinline__ void add(Scores& s, int begin, int end) {
#pragma unroll
      for (int j = begin; j < end; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float* pair = &s[4 * j + 2 * r];
          pair[0] = ptx::exp2(fmaf(pair[0], rows.factor, -base[r]));
          pair[1] = ptx::exp2(fmaf(pair[1], rows.factor, -base[r]));
          rows.online.sum[r] += pair[0];
          odd[r] += pair[1];
        }
      }
    }
    __device__ __forceinline__ void finish() {
#pragma unroll
      for (int r = 0; r < 2; ++r) rows.online.sum[r] += odd[r];
    }
  };

  static __device__ __forceinline__ void find_largest(const Scores& s, int begin, int end,
                                                      float (&largest)[2]) {
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
  }
};

}  // namespace flash2::sm90
