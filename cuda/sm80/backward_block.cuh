// What both kernels of the backward are made of: a block's geometry, its shared memory, its steps,
// and the products and copies of one warp.
#pragma once

#include <cstdint>

#include "backward_rows.h"
#include "dquery_sums.cuh"
#include "finish_rows.cuh"
#include "mask.cuh"
#include "problem.h"
#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "scheduler_backward.cuh"
#include "segments.cuh"
#include "sm80/backward_scores.cuh"
#include "sm80/copies.cuh"
#include "sm80/products.cuh"
#include "sm80/tiles.h"
#include "softmax.cuh"

namespace flash2::sm80 {

// kGeneral: with soft cap, ALiBi or segment ids.
template <int kTile, DataType kType, bool kGeneral>
struct BackwardBlock {
  static constexpr BackwardTile kT = kBackwardTiles[kTile];
  static constexpr int kD = kT.head_dim, kTileQ = kT.tile_q, kTileKv = kT.tile_kv();
  static constexpr int kStages = kT.stages, kWarps = 4 * kT.roles;
  // A warp's part of the tile: kM blocks of 16 keys, kStride apart, by kCols queries; of dK or dV
  // the same keys by kAccCols columns.
  static constexpr int kM = kT.key_blocks, kKeyWarps = kT.key_warps, kSplit = 4 / kKeyWarps;
  static constexpr int kStride = 16 * kKeyWarps, kCols = kTileQ / kSplit, kN = kCols / 8;
  static constexpr int kAccCols = kD / kSplit;
  // Of dQ: kQm blocks of 16 rows by kQCols columns.
  static constexpr int kQm = kTileQ >= 32 ? 2 : 1, kQRowGroups = kTileQ / (16 * kQm);
  static constexpr int kQCols = kD / (kWarps / kQRowGroups);
  static_assert(kTileQ <= 64 && kQCols >= 16 && kCols >= 16);
  static constexpr uint32_t kPanelQ = kTileQ * 128, kPanelKv = kTileKv * 128;
  static constexpr uint32_t kQBytes = kTileQ * kD * 2, kKvBytes = kTileKv * kD * 2;
  static constexpr uint32_t kDsBytes = kTileKv * 128;
  using CopyQ = TileCopy<kTileQ, kD, kTileQ, 128>;
  using CopyKv = TileCopy<kTileKv, kD, kTileKv, 128>;
  using Scores = float[kM][kN][4];
  using Gradient = float[kM][kAccCols / 8][4];

  // Shared memory.
  uint32_t k, v, q, dout, ds, hand, lse, delta, barriers;

  const BackwardParams& params;
  const BackwardProblem& p;
  int lane, warp;
  int key_warp, split;  // the warp's place along the keys, and along queries or columns
  BackwardWork<kTileQ, kTileKv> work;
  int group, total;

  // A tile of queries of one head, and the stage that it lies in.
  struct Step {
    int number = 0;
    int head;
    int tile;
    uint32_t stage = 0;
    uint32_t parity = 0;
  };

  __device__ __forceinline__ BackwardBlock(const BackwardParams& params, uint32_t shared)
      : k(shared),
        v(k + kKvBytes),
        q(v + kKvBytes),
        dout(q + kStages * kQBytes),
        ds(dout + kStages * kQBytes),
        hand(ds + kT.ds_buffers() * kDsBytes),
        lse(hand + kT.hand_bytes()),
        delta(lse + kStages * 4 * kTileQ),
        barriers(delta + kStages * 4 * kTileQ),
        params(params),
        p(params.problem),
        lane(threadIdx.x % 32),
        warp(__shfl_sync(~0u, threadIdx.x / 32, 0)),
        key_warp(warp % 4 % kKeyWarps),
        split(warp % 4 / kKeyWarps),
        work(params, tile_number(params, ds)) {
    if constexpr (kGeneral) {
      if (p.query_segment_ids.data) {
        if (!params.turns && work.first_q < work.end_q) {
          const Interval rows = segment_keys<kWarps>(
              p.key_value_segment_ids.row(work.batch), p.query_segment_ids.row(work.batch),
              work.key0, min(work.key0 + kTileKv, work.visibility.kv_length) - 1,
              work.first_q * kTileQ, min(work.end_q * kTileQ, work.q_length), ds);
          work.first_q = max(work.first_q, rows.begin / kTileQ);
          work.end_q = min(work.end_q, (rows.end + kTileQ - 1) / kTileQ);
        }
      }
    }
    group = p.heads_q / p.heads_kv;
    total = max(work.end_q - work.first_q, 0) * group;
  }

  // Where key tiles take turns they are numbered in the order in which blocks start: who is waited
  // for is running.
  static __device__ __forceinline__ uint32_t tile_number(const BackwardParams& params,
                                                         uint32_t scratch) {
    if (!params.turns) return blockIdx.x;
    if (threadIdx.x == 0) ptx::store_shared(scratch, atomicAdd(params.ticket, 1));
    __syncthreads();
    const uint32_t number = ptx::load_shared(scratch);
    __syncthreads();
    return number;
  }

  // ------------------------------------------------------------------------------------- steps

  __device__ __forceinline__ Step first_step() const {
    return {0, work.head_kv * group, work.end_q - 1};
  }
  __device__ __forceinline__ void advance(Step& at) const {
    ++at.number;
    if (at.tile-- == work.first_q) {
      at.tile = work.end_q - 1;
      ++at.head;
    }
    if (++at.stage == kStages) {
      at.stage = 0;
      at.parity ^= 1;
    }
  }
  __device__ __forceinline__ int64_t workspace_row(const Step& at) const {
    return (int64_t{work.batch} * p.heads_q + at.head) * params.rows_per_head + at.tile * kTileQ;
  }
  __device__ __forceinline__ float scale() const {
    return p.scale_operand.data ? p.scale * p.scale_operand.at(work.batch) : p.scale;
  }

  // ------------------------------------------------------------------- copies, by 128 threads

  // A step's Q and logsumexps, or dO and deltas.
  __device__ __forceinline__ void copy_rows(const Step& at, bool of_query) const {
    const uint32_t thread = ptx::opaque(threadIdx.x) % 128;
    const char* source = static_cast<const char*>(of_query ? p.query : p.dout);
    const Strides& stride = of_query ? p.query_stride : p.dout_stride;
    source += 2 * (work.batch * stride.batch + at.head * stride.head);
    CopyQ::load((of_query ? q : dout) + at.stage * kQBytes, source, 2 * stride.row,
                at.tile * kTileQ, thread, work.q_length - at.tile * kTileQ,
                of_query ? p.head_dim : p.head_dim_v);
    if (thread < kTileQ / 4) {
      ptx::copy_async_16((of_query ? lse : delta) + at.stage * 4 * kTileQ + 16 * thread,
                         (of_query ? params.lse2 : params.delta) + workspace_row(at) + 4 * thread);
    }
  }

  // K or V.
  __device__ __forceinline__ void copy_keys(bool of_key) const {
    const char* source = static_cast<const char*>(of_key ? p.key : p.value);
    const Strides& stride = of_key ? p.key_stride : p.value_stride;
    source += 2 * (work.batch * stride.batch + work.head_kv * stride.head);
    CopyKv::load(of_key ? k : v, source, 2 * stride.row, work.key0, threadIdx.x % 128,
                 work.visibility.kv_length - work.key0, of_key ? p.head_dim : p.head_dim_v);
  }

  // ---------------------------------------------------------------------------------- products

  // x^T = A B^T over head_dim: A the warp's rows of K or V, B its rows of Q or dO.
  __device__ __forceinline__ void multiply_scores(Scores& x, uint32_t a, uint32_t b) const {
    const uint32_t l = ptx::opaque(lane);
    const uint32_t a_address = a + key_warp * 2048 + swizzle(l % 16, l / 16);
    const uint32_t b_address = b + split * kCols * 128 + swizzle(l % 8 + l / 16 * 8, l / 8 % 2);
    clear(x);
    multiply<kType, kM, kN / 2, kD / 16>(
        x,
        [&](int step, uint32_t (&fragments)[kM][4]) {
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            ptx::load_matrix_x4(fragments[m], (a_address ^ step % 4 << 5) + step / 4 * kPanelKv +
                                                  m * kStride * 128);
          }
        },
        [&](int step, int n, uint32_t (&fragment)[4]) {
          ptx::load_matrix_x4(fragment,
                              (b_address ^ step % 4 << 5) + step / 4 * kPanelQ + n * 2048);
        });
  }

  // gradient += A B over the tile's queries, B the warp's columns of dO or Q.
  template <class LoadA>
  __device__ __forceinline__ void accumulate(Gradient& gradient, uint32_t b, LoadA load_a) const {
    const uint32_t l = ptx::opaque(lane);
    const uint32_t b_address = b + split * (kAccCols / 64) * kPanelQ + swizzle(l % 16, l / 16);
    multiply<kType, kM, kAccCols / 16, kTileQ / 16>(
        gradient, load_a, [&](int step, int n, uint32_t (&fragment)[4]) {
          ptx::load_matrix_x4_transposed(fragment,
                                         (b_address ^ n % 4 << 5) + n / 4 * kPanelQ + step * 2048);
        });
  }

  // The warp's part of dQ = dS K, added to the sums in global memory. Calls `read` once it has
  // read dS.
  template <class Read>
  __device__ __forceinline__ void add_dquery(const Step& at, uint32_t ds, Read read) const {
    const uint32_t l = ptx::opaque(lane);
    const int row = warp % kQRowGroups * 16 * kQm, column = warp / kQRowGroups * kQCols;
    const uint32_t a_address = ds + swizzle(l % 8 + l / 16 * 8, row / 8 + l / 8 % 2);
    const uint32_t b_address =
        k + column / 64 * kPanelKv + swizzle(l % 16, column % 64 / 8 + l / 16);
    float dq[kQm][kQCols / 8][4];
    clear(dq);
    multiply<kType, kQm, kQCols / 16, kTileKv / 16>(
        dq,
        [&](int step, uint32_t (&fragments)[kQm][4]) {
#pragma unroll
          for (int m = 0; m < kQm; ++m) {
            ptx::load_matrix_x4_transposed(fragments[m], (a_address ^ m << 5) + step * 2048);
          }
        },
        [&](int step, int n, uint32_t (&fragment)[4]) {
          ptx::load_matrix_x4_transposed(fragment, (b_address ^ n << 5) + step * 2048);
        });
    read();
    int* turn = nullptr;
    if (params.turns) {  // key tiles take turns, from the first on that this tile needs
      turn = params.turns + workspace_row(at) / 16;
      const int before =
          work.key0 / kTileKv - work.visibility.row(p, at.tile * kTileQ).begin / kTileKv;
      // Not until it is equal: faster warps of this block may have added to the turn already.
      if (lane == 0) {
        while (ptx::load_acquire(turn) < kWarps * before) {
        }
      }
      __syncwarp();
    }
    float* sums = params.dquery_sums + (workspace_row(at) + row) * p.head_dim + column * 16;
#pragma unroll
    for (int m = 0; m < kQm; ++m)
#pragma unroll
      for (int n = 0; n < kQCols / 8; ++n) {
        if (column + 8 * n < p.head_dim) {
          DquerySums{sums + int64_t{16} * m * p.head_dim + n * 128}.add(lane, dq[m][n]);
        }
      }
    if (turn) {
      __threadfence();
      __syncwarp();
      if (lane == 0) ptx::add_release(turn, 1);
    }
  }

  // ------------------------------------------------------------------------------- elementwise

  // Whether a step has scores to mask: above and below the rows' intervals.
  struct Cut {
    bool above, below;
  };
  __device__ __forceinline__ Cut cut(const Step& at) const {
    return {work.key0 + kTileKv > work.visibility.row(p, at.tile * kTileQ).end,
            work.key0 < work.visibility.row(p, work.last_row(at.tile)).begin};
  }

  // What scores are multiplied with, and a masked score that then comes out as -inf, whatever the
  // scale's sign. A scale of 0 becomes tiny.
  __device__ __forceinline__ float factor() const {
    const float s = scale();
    return kGeneral ? kLog2E : s == 0.0f ? 1e-37f : s * kLog2E;
  }

  // Scores of q.k to logits, if kGeneral, and what the masks rule out to -inf after `factor`.
  __device__ __forceinline__ void adjust(Scores& s, const Step& at, Cut cut) const {
    const int row0 = at.tile * kTileQ + split * kCols, key0 = work.key0 + key_warp * 16;
    float masked = -INFINITY;
    if constexpr (kGeneral) {
      const float factor = scale();
      float* all = &s[0][0][0];
#pragma unroll
      for (int e = 0; e < kM * kN * 4; ++e) all[e] *= factor;
      if (p.soft_cap > 0.0f) {
#pragma unroll
        for (int e = 0; e < kM * kN * 4; ++e) all[e] = cap_score(all[e], p.soft_cap);
      }
      if (p.query_segment_ids.data) {
        const int batch = ptx::opaque(work.batch);  // no register is left to keep pointers
        mask_key_ids<kStride>(s, p.query_segment_ids.row(batch) + row0, work.q_length - row0,
                              p.key_value_segment_ids.row(batch) + key0,
                              work.visibility.kv_length - key0);
      }
    } else if (factor() < 0.0f) {
      masked = INFINITY;
    }
    if (cut.above) {
      mask_keys<kStride, true>(s, masked,
                               [&](int r) { return work.visibility.row(p, row0 + r).end - key0; });
    }
    if (cut.below) {
      mask_keys<kStride, false>(
          s, masked, [&](int r) { return work.visibility.row(p, row0 + r).begin - key0; });
    }
  }

  // A value each of the thread's four queries among 16, such as their logsumexps.
  struct RowPairs {
    float2 of[2];

    __device__ __forceinline__ RowPairs(uint32_t values, int step)
        : of{ptx::load_shared_8(values + step * 64), ptx::load_shared_8(values + step * 64 + 32)} {
    }
  };

  // From scores to probabilities, times 2^12.
  struct Exponential {
    float factor;
    uint32_t lse;  // of the thread's first query
    float slope;   // of ALiBi; with `distance`, i - j of the thread's first query and key
    float distance;
    float cap;

    // The probabilities of 16 queries (number `step`) by 16 keys (block m) as an A operand, and
    // those that dS wants: times the slope of the soft cap.
    __device__ __forceinline__ void operator()(const Scores& s, const RowPairs& lses, int step,
                                               int m, uint32_t (&own)[4],
                                               uint32_t (&hand)[4]) const {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 l = lses.of[w / 2];
        const float* pair = &s[m][2 * step + w / 2][w % 2 * 2];
        float x[2] = {pair[0], pair[1]}, bend[2] = {1.0f, 1.0f};
        if constexpr (kGeneral) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (cap > 0.0f) {  // d cap tanh(x / cap) = 1 - tanh^2
              const float t = x[i] * (1.0f / cap);
              bend[i] = x[i] == -INFINITY ? 0.0f : fmaf(-t, t, 1.0f);
            }
            const int offset = 16 * step + 8 * (w / 2) + i - kStride * m - 8 * (w % 2);
            x[i] = fmaf(-slope, fabsf(distance + static_cast<float>(offset)), x[i]);
          }
        }
        const float low = ptx::exp2(fmaf(x[0], factor, -l.x));
        const float high = ptx::exp2(fmaf(x[1], factor, -l.y));
        own[w] = ptx::pack<kType>(low, high);
        hand[w] = ptx::pack<DataType::kFloat16>(low * bend[0], high * bend[1]);
      }
    }
  };
  __device__ __forceinline__ Exponential exponential(const Step& at, float factor) const {
    const int query = split * kCols + lane % 4 * 2;
    Exponential e{factor, lse + (at.stage * kTileQ + query) * 4, 0.0f, 0.0f, p.soft_cap};
    if constexpr (kGeneral) {
      if (p.alibi_slopes.data) e.slope = p.alibi_slopes.at(work.batch, at.head);
      e.distance = static_cast<float>(at.tile * kTileQ + query + work.visibility.offset -
                                      work.key0 - key_warp * 16 - lane / 4);
    }
    return e;
  }

  // Where the deltas of the thread's queries lie.
  __device__ __forceinline__ uint32_t deltas(const Step& at) const {
    return delta + (at.stage * kTileQ + split * kCols + lane % 4 * 2) * 4;
  }

  // dS^T = P^T (dP^T - delta) of 16 queries by 16 keys as an A operand, also left at `target` in
  // rows of keys.
  __device__ __forceinline__ void score_gradients(const Scores& dp, const RowPairs& deltas,
                                                  int step, int m, const uint32_t (&hand)[4],
                                                  uint32_t target, uint32_t (&own)[4]) const {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 d = deltas.of[w / 2];
      const float2 prob = ptx::unpack<DataType::kFloat16>(hand[w]);
      const float* pair = &dp[m][2 * step + w / 2][w % 2 * 2];
      own[w] = ptx::pack<kType>(prob.x * fmaf(pair[0], kProbabilityUnit, -d.x),
                                prob.y * fmaf(pair[1], kProbabilityUnit, -d.y));
      const int chunk = split * (kCols / 8) + 2 * step + w / 2;
      ptx::store_shared(target + (m * kStride + w % 2 * 8) * 128 +
                            swizzle(key_warp * 16 + lane / 4, chunk) + lane % 4 * 4,
                        own[w]);
    }
  }

  // The warp's part of dV or dK, times `unit`, through the place of V or K, which nobody reads any
  // more. Rows past the length saw nothing and are 0.
  __device__ __forceinline__ void store(const Gradient& gradient, float unit, bool of_key) const {
    const uint32_t place = (of_key ? k : v) + split * (kAccCols / 64) * kPanelKv;
    const uint32_t row = key_warp * 16 + lane / 4;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int j = 0; j < kAccCols / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          ptx::store_shared(
              place + j / 8 * kPanelKv + (m * kStride + 8 * r) * 128 + swizzle(row, j % 8) +
                  lane % 4 * 4,
              ptx::pack<kType>(gradient[m][j][2 * r] * unit, gradient[m][j][2 * r + 1] * unit));
        }
    __syncwarp();
    char* target = static_cast<char*>(of_key ? p.dkey : p.dvalue);
    const Strides& stride = of_key ? p.dkey_stride : p.dvalue_stride;
    target += 2 * (work.batch * stride.batch + work.head_kv * stride.head + split * kAccCols);
    const int columns = (of_key ? p.head_dim : p.head_dim_v) - split * kAccCols;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int first = m * kStride + key_warp * 16;  // of 16 rows
      TileCopy<16, kAccCols, kTileKv, 32>::store(place + first * 128, target, 2 * stride.row,
                                                 work.key0 + first, lane,
                                                 p.seq_kv - work.key0 - first, columns);
    }
  }

  // The last block of a key head makes dQ of its query heads, of sums that the L2 cache still has.
  __device__ __forceinline__ void finish_rows() const {
    if (!params.finish_inside) return;
    static_assert(kWarps * 16 * kFinishPitch<kD> <= 2 * (kKvBytes + kStages * kQBytes));
    __threadfence();
    __syncthreads();
    int* finished = params.finished + int64_t{work.batch} * p.heads_kv + work.head_kv;
    // Not through a barrier's place, which may serve nothing else (mbarrier.inval would have to
    // come first): on Hopper the barrier's state has been seen to come back over the number.
    if (threadIdx.x == 0) ptx::store_shared(ds, atomicAdd(finished, 1));
    __syncthreads();
    if (ptx::load_shared(ds) != params.tiles_kv - 1) return;
    __threadfence();
    const int strips = (p.seq_q + 15) / 16;
    for (int i = warp; i < strips * group; i += kWarps) {
      finish_strip<kD, kType>(params, work.batch, work.head_kv * group + i / strips,
                              i % strips * 16, k + warp * 16 * kFinishPitch<kD>);
    }
  }
};

}  // namespace flash2::sm80
