// FlashAttention-2's backward for compute capability 8.0 and newer: the main kernel.
//
//   a block computes dK and dV of one tile of keys of one key head:
//     for each query head of the group, for each tile of queries that sees the keys, last first:
//       P^T  = exp2(c K Q^T - lse2)        dV += P^T dO
//       dS^T = P^T * (V dO^T - delta)      dK += dS^T Q
//       dQ  += dS K                        added to float32 sums in global memory
//
// Roles: warps 0 to 3 own P and dV, warps 4 to 7 own dS and dK; a warp of each makes a pair that
// holds the same keys and shares a sub-core. Transposed products leave P^T and dS^T where the next
// product wants its A operand, in registers. P^T goes from the one warp of a pair to the other
// through shared memory, as float16 and times 2^12; dS^T goes to all eight, which split dQ.
// The roles run half a step apart: while P is exponentiated dP^T is multiplied, and so on. dQ of a
// step is computed by the P warps at the start of the next.
//
// Barriers: per stage `q_full` (Q, logsumexps; copied by the P warps), `do_full` (dO, deltas; by
// the dS warps) and `empty`, at which all arrive; `p_full` per keys of a warp; `ds_full` and
// `ds_empty`. P needs no `empty`: who writes P of the next step has waited for dS of this one.
#pragma once

#include <cstdint>
#include <utility>

#include "backward_rows.h"
#include "dquery_sums.cuh"
#include "mask.cuh"
#include "problem.h"
#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "scheduler_backward.cuh"
#include "segments.cuh"
#include "sm80/backward_scores.cuh"
#include "sm80/copies.cuh"
#include "sm80/kernels.h"
#include "sm80/products.cuh"
#include "sm80/tiles.h"
#include "softmax.cuh"

namespace flash2::sm80 {

// kGeneral: with soft cap, ALiBi or segment ids.
template <int kTile, DataType kType, bool kGeneral>
__global__ void __launch_bounds__(256, 1) backward(const __grid_constant__ BackwardParams params) {
  constexpr BackwardTile kT = kBackwardTiles[kTile];
  constexpr int kD = kT.head_dim, kTileQ = kT.tile_q, kTileKv = kT.tile_kv();
  constexpr int kStages = kT.stages, kRoleThreads = 128;
  // A warp's part of the tile: kM blocks of 16 keys, kStride apart, by kCols queries; of dK or dV
  // the same keys by kAccCols columns.
  constexpr int kM = kT.key_blocks, kKeyWarps = kT.key_warps, kSplit = 4 / kKeyWarps;
  constexpr int kStride = 16 * kKeyWarps, kCols = kTileQ / kSplit, kN = kCols / 8;
  constexpr int kAccCols = kD / kSplit;
  // Of dQ: kQm blocks of 16 rows by kQCols columns.
  constexpr int kQm = kTileQ >= 32 ? 2 : 1, kQRowGroups = kTileQ / (16 * kQm);
  constexpr int kQCols = kD / (8 / kQRowGroups);
  static_assert(kTileQ <= 64 && kQCols >= 16 && kCols >= 16);
  constexpr uint32_t kPanelQ = kTileQ * 128, kPanelKv = kTileKv * 128;
  constexpr uint32_t kQBytes = kTileQ * kD * 2, kKvBytes = kTileKv * kD * 2;
  using CopyQ = TileCopy<kTileQ, kD, kTileQ, kRoleThreads>;
  using CopyKv = TileCopy<kTileKv, kD, kTileKv, kRoleThreads>;
  using Scores = float[kM][kN][4];

  extern __shared__ __align__(1024) char shared_memory[];
  const uint32_t smem_k = ptx::shared_address(shared_memory);
  const uint32_t smem_v = smem_k + kKvBytes;
  const uint32_t smem_q = smem_v + kKvBytes;            // [kStages]
  const uint32_t smem_do = smem_q + kStages * kQBytes;  // [kStages]
  const uint32_t smem_p = smem_do + kStages * kQBytes;
  const uint32_t smem_ds = smem_p + 2 * kTileKv * kTileQ;
  const uint32_t smem_lse = smem_ds + 128 * kTileKv;  // [kStages]
  const uint32_t smem_delta = smem_lse + kStages * 4 * kTileQ;
  const uint32_t barriers = smem_delta + kStages * 4 * kTileQ;
  const uint32_t q_full = barriers, do_full = q_full + 8 * kStages;
  const uint32_t empty = do_full + 8 * kStages, p_full = empty + 8 * kStages;
  const uint32_t ds_full = p_full + 8 * kKeyWarps, ds_empty = ds_full + 8;
  static_assert(8 * (3 * kStages + kKeyWarps + 2) <= kT.barrier_bytes());

  const BackwardProblem& p = params.problem;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int key_warp = warp % 4 % kKeyWarps, split = warp % 4 / kKeyWarps;
  const bool p_role = warp < 4;
  uint32_t index = blockIdx.x;
  if (params.turns) {  // tiles in the order in which blocks start: who is waited for is running
    if (threadIdx.x == 0) ptx::store_shared(smem_p, atomicAdd(params.ticket, 1));
    __syncthreads();
    index = ptx::load_shared(smem_p);
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(q_full + 8 * stage, kRoleThreads);
      ptx::mbarrier_init(do_full + 8 * stage, kRoleThreads);
      ptx::mbarrier_init(empty + 8 * stage, 256);
    }
    for (int w = 0; w < kKeyWarps; ++w) ptx::mbarrier_init(p_full + 8 * w, 32 * kSplit);
    ptx::mbarrier_init(ds_full, kRoleThreads);
    ptx::mbarrier_init(ds_empty, 256);
  }
  __syncthreads();

  BackwardWork<kTileQ, kTileKv> work(params, index);
  const int* query_ids = nullptr;
  const int* key_ids = nullptr;
  if constexpr (kGeneral) {
    if (p.query_segment_ids.data) {
      query_ids = p.query_segment_ids.row(work.batch);
      key_ids = p.key_value_segment_ids.row(work.batch);
      if (!params.turns && work.first_q < work.end_q) {
        const Interval rows = segment_keys<8>(
            key_ids, query_ids, work.key0, min(work.key0 + kTileKv, work.visibility.kv_length) - 1,
            work.first_q * kTileQ, min(work.end_q * kTileQ, work.q_length), smem_p);
        work.first_q = max(work.first_q, rows.begin / kTileQ);
        work.end_q = min(work.end_q, (rows.end + kTileQ - 1) / kTileQ);
      }
    }
  }
  const int group = p.heads_q / p.heads_kv;
  const int count = max(work.end_q - work.first_q, 0), total = count * group;
  const int keys = work.visibility.kv_length - work.key0;  // of the tile, if below kTileKv

  // A step: a tile of queries of one head, and the stage that it lies in.
  struct Step {
    int number = 0;
    int head;
    int tile;
    uint32_t stage = 0;
    uint32_t parity = 0;
  };
  const auto advance = [&](Step& at) {
    ++at.number;
    if (at.tile-- == work.first_q) {
      at.tile = work.end_q - 1;
      ++at.head;
    }
    if (++at.stage == kStages) {
      at.stage = 0;
      at.parity ^= 1;
    }
  };
  const int first_head = work.head_kv * group;
  Step now{0, first_head, work.end_q - 1}, next = now;
  const auto workspace_row = [&](const Step& at) {
    return (int64_t{work.batch} * p.heads_q + at.head) * params.rows_per_head + at.tile * kTileQ;
  };

  // Copies the role's share of the step `next`: Q and logsumexps, or dO and deltas.
  const auto copy_next = [&] {
    if (next.number >= total) return;
    const uint32_t thread = ptx::opaque(threadIdx.x) % kRoleThreads;
    const int rows = work.q_length - next.tile * kTileQ;
    const char* source = static_cast<const char*>(p_role ? p.query : p.dout);
    const Strides& stride = p_role ? p.query_stride : p.dout_stride;
    source += 2 * (work.batch * stride.batch + next.head * stride.head);
    ptx::mbarrier_wait(empty + 8 * next.stage, next.parity ^ 1);
    CopyQ::load((p_role ? smem_q : smem_do) + next.stage * kQBytes, source, 2 * stride.row,
                next.tile * kTileQ, thread, rows, p_role ? p.head_dim : p.head_dim_v);
    if (thread < kTileQ / 4) {
      ptx::copy_async_16((p_role ? smem_lse : smem_delta) + next.stage * 4 * kTileQ + 16 * thread,
                         (p_role ? params.lse2 : params.delta) + workspace_row(next) + 4 * thread);
    }
    ptx::mbarrier_arrive_after_copies((p_role ? q_full : do_full) + 8 * next.stage);
    advance(next);
  };

  if (total > 0) {
    const char* source = static_cast<const char*>(p_role ? p.key : p.value);
    const Strides& stride = p_role ? p.key_stride : p.value_stride;
    source += 2 * (work.batch * stride.batch + work.head_kv * stride.head);
    CopyKv::load(p_role ? smem_k : smem_v, source, 2 * stride.row, work.key0,
                 threadIdx.x % kRoleThreads, keys, p_role ? p.head_dim : p.head_dim_v);
    for (int i = 0; i < kStages - 1; ++i) copy_next();
  }

  float acc[kM][kAccCols / 8][4];  // dV or dK
  clear(acc);

  // x^T = A B^T over head_dim: A the warp's rows of K or V, B its rows of Q or dO.
  const auto multiply_scores = [&](Scores& x, uint32_t smem_a, uint32_t smem_b) {
    const uint32_t l = ptx::opaque(lane);
    const uint32_t a_address = smem_a + key_warp * 2048 + swizzle(l % 16, l / 16);
    const uint32_t b_address =
        smem_b + split * kCols * 128 + swizzle(l % 8 + l / 16 * 8, l / 8 % 2);
    clear(x);
    multiply<kType, kM, kN / 2, kD / 16>(
        x,
        [&](int k, uint32_t (&a)[kM][4]) {
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            ptx::load_matrix_x4(a[m],
                                (a_address ^ k % 4 << 5) + k / 4 * kPanelKv + m * kStride * 128);
          }
        },
        [&](int k, int n, uint32_t (&b)[4]) {
          ptx::load_matrix_x4(b, (b_address ^ k % 4 << 5) + k / 4 * kPanelQ + n * 2048);
        });
  };

  // acc += A B over the tile's queries, B the warp's columns of dO or Q.
  const auto accumulate = [&](uint32_t smem_b, auto load_a) {
    const uint32_t l = ptx::opaque(lane);
    const uint32_t b_address =
        smem_b + split * (kAccCols / 64) * kPanelQ + swizzle(l % 16, l / 16);
    multiply<kType, kM, kAccCols / 16, kTileQ / 16>(
        acc, load_a, [&](int k, int n, uint32_t (&b)[4]) {
          ptx::load_matrix_x4_transposed(b, (b_address ^ n % 4 << 5) + n / 4 * kPanelQ + k * 2048);
        });
  };

  // The warp's part of dQ of a step whose dS is in shared memory.
  const auto add_dquery = [&](const Step& at) {
    const uint32_t l = ptx::opaque(lane);
    const int row = warp % kQRowGroups * 16 * kQm, column = warp / kQRowGroups * kQCols;
    const uint32_t a_address = smem_ds + swizzle(l % 8 + l / 16 * 8, row / 8 + l / 8 % 2);
    const uint32_t b_address =
        smem_k + column / 64 * kPanelKv + swizzle(l % 16, column % 64 / 8 + l / 16);
    float dq[kQm][kQCols / 8][4];
    clear(dq);
    ptx::mbarrier_wait(ds_full, at.number % 2);
    multiply<kType, kQm, kQCols / 16, kTileKv / 16>(
        dq,
        [&](int k, uint32_t (&a)[kQm][4]) {
#pragma unroll
          for (int m = 0; m < kQm; ++m) {
            ptx::load_matrix_x4_transposed(a[m], (a_address ^ m << 5) + k * 2048);
          }
        },
        [&](int k, int n, uint32_t (&b)[4]) {
          ptx::load_matrix_x4_transposed(b, (b_address ^ n << 5) + k * 2048);
        });
    ptx::mbarrier_arrive(ds_empty);
    const int64_t first_row = workspace_row(at) + row;
    int* turn = nullptr;
    if (params.turns) {  // key tiles take turns, from the first on that this tile needs
      turn = params.turns + workspace_row(at) / 16;
      const int before =
          work.key0 / kTileKv - work.visibility.row(p, at.tile * kTileQ).begin / kTileKv;
      if (lane == 0) {
        while (ptx::load_acquire(turn) != 8 * before) {
        }
      }
      __syncwarp();
    }
    float* sums = params.dquery_sums + first_row * p.head_dim + column * 16;
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
  };

  float scale = p.scale;
  if (p.scale_operand.data) scale *= p.scale_operand.at(work.batch);

  const int key_offset = key_warp * 16;  // of the warp's first key in the tile
  constexpr int kOwn = kSplit == 1 ? kN / 2 : 1;
  // P^T, 16 keys by 16 queries at a time, lies in the order of A operands.
  const auto hand_address = [&](int m, int k) {
    const int block = (m * kKeyWarps + key_warp) * (kTileQ / 16) + k;
    return smem_p + (block * 32 + lane) * 16;
  };
  const auto load_hand = [&](int m, int k) { return ptx::load_shared_16(hand_address(m, k)); };

  if (p_role) {
    // Masked scores times it must give -inf, whatever its sign; a scale of 0 becomes tiny.
    const float factor = kGeneral ? kLog2E : scale == 0.0f ? 1e-37f : scale * kLog2E;
    const float masked = factor < 0.0f ? INFINITY : -INFINITY;
    Step last = now;
    uint32_t own[kOwn][kM][4];  // P^T as an A operand, where the warp has all of its queries

    // P^T, handed over and kept; `adjust` changes and masks the scores.
    const auto probabilities = [&](auto adjust) {
      Scores s;
      multiply_scores(s, smem_k, smem_q + now.stage * kQBytes);
      if constexpr (kStages > 1) copy_next();
      adjust(s);
      if (kSplit > 1 && now.number > 0) ptx::mbarrier_wait(ds_empty, (now.number - 1) % 2);
      const uint32_t lses = smem_lse + (now.stage * kTileQ + split * kCols + lane % 4 * 2) * 4;
      [[maybe_unused]] float slope = 0.0f, distance = 0.0f;
      if constexpr (kGeneral) {
        if (p.alibi_slopes.data) slope = p.alibi_slopes.at(work.batch, now.head);
        distance = static_cast<float>(now.tile * kTileQ + split * kCols + lane % 4 * 2 +
                                      work.visibility.offset - work.key0 - key_offset - lane / 4);
      }
#pragma unroll
      for (int k = 0; k < kN / 2; ++k) {
        const float2 lse[2] = {ptx::load_shared_8(lses + k * 64),
                               ptx::load_shared_8(lses + k * 64 + 32)};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          uint32_t hand[4];
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            const float* pair = &s[m][2 * k + w / 2][w % 2 * 2];
            const float2 l = lse[w / 2];
            float x[2] = {pair[0], pair[1]}, bend[2] = {1.0f, 1.0f};
            if constexpr (kGeneral) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                if (p.soft_cap > 0.0f) {  // d cap tanh(x / cap) = 1 - tanh^2
                  const float t = x[i] * (1.0f / p.soft_cap);
                  bend[i] = x[i] == -INFINITY ? 0.0f : fmaf(-t, t, 1.0f);
                }
                const int offset = 16 * k + 8 * (w / 2) + i - kStride * m - 8 * (w % 2);
                x[i] = fmaf(-slope, fabsf(distance + static_cast<float>(offset)), x[i]);
              }
            }
            const float low = ptx::exp2(fmaf(x[0], factor, -l.x));
            const float high = ptx::exp2(fmaf(x[1], factor, -l.y));
            if constexpr (kSplit == 1) own[k][m][w] = ptx::pack<kType>(low, high);
            hand[w] = ptx::pack<DataType::kFloat16>(low * bend[0], high * bend[1]);
          }
          ptx::store_shared_16(hand_address(m, split * (kN / 2) + k),
                               uint4{hand[0], hand[1], hand[2], hand[3]});
        }
      }
    };

#pragma unroll 1
    for (; now.number < total; advance(now)) {
      if (now.number > 0) add_dquery(last);
      last = now;
      if constexpr (kStages == 1) copy_next();
      ptx::mbarrier_wait(q_full + 8 * now.stage, now.parity);
      const int row0 = now.tile * kTileQ + split * kCols, key0 = work.key0 + key_offset;
      const Interval lowest = work.visibility.row(p, now.tile * kTileQ);
      const Interval highest = work.visibility.row(p, work.last_row(now.tile));
      const bool cut_above = work.key0 + kTileKv > lowest.end;
      const bool cut_below = work.key0 < highest.begin;
      if (kGeneral || cut_above || cut_below) {
        probabilities([&](Scores& s) {
          if constexpr (kGeneral) {
            float* all = &s[0][0][0];
#pragma unroll
            for (int e = 0; e < kM * kN * 4; ++e) all[e] *= scale;
            if (p.soft_cap > 0.0f) {
#pragma unroll
              for (int e = 0; e < kM * kN * 4; ++e) all[e] = cap_score(all[e], p.soft_cap);
            }
            if (query_ids) {
              mask_key_ids<kStride>(s, query_ids + row0, work.q_length - row0, key_ids + key0,
                                    work.visibility.kv_length - key0);
            }
          }
          if (cut_above) {
            mask_keys<kStride, true>(
                s, masked, [&](int r) { return work.visibility.row(p, row0 + r).end - key0; });
          }
          if (cut_below) {
            mask_keys<kStride, false>(
                s, masked, [&](int r) { return work.visibility.row(p, row0 + r).begin - key0; });
          }
        });
      } else {
        probabilities([](Scores&) {});
      }
      ptx::mbarrier_arrive(p_full + 8 * key_warp);
      ptx::mbarrier_wait(do_full + 8 * now.stage, now.parity);
      if constexpr (kSplit == 1) {
        accumulate(smem_do + now.stage * kQBytes, [&](int k, uint32_t (&a)[kM][4]) {
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int w = 0; w < 4; ++w) a[m][w] = own[k][m][w];
        });
      } else {  // half of the queries are another warp's: all come from where they were handed
                // over
        ptx::mbarrier_wait(p_full + 8 * key_warp, now.number % 2);
        accumulate(smem_do + now.stage * kQBytes, [&](int k, uint32_t (&a)[kM][4]) {
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            const uint4 hand = load_hand(m, k);
            const uint32_t words[] = {hand.x, hand.y, hand.z, hand.w};
#pragma unroll
            for (int w = 0; w < 4; ++w) {
              const float2 x = ptx::unpack<DataType::kFloat16>(words[w]);
              a[m][w] = kType == DataType::kFloat16 ? words[w] : ptx::pack<kType>(x.x, x.y);
            }
          }
        });
      }
      ptx::mbarrier_arrive(empty + 8 * now.stage);
    }
    if (total > 0) add_dquery(last);
  } else {
    uint32_t own[kOwn][kM][4];  // dS^T as an A operand, likewise
#pragma unroll 1
    for (; now.number < total; advance(now)) {
      copy_next();
      Scores x;
      ptx::mbarrier_wait(do_full + 8 * now.stage, now.parity);
      multiply_scores(x, smem_v, smem_do + now.stage * kQBytes);
      const uint32_t deltas = smem_delta + (now.stage * kTileQ + split * kCols + lane % 4 * 2) * 4;
      const uint32_t row = key_offset + lane / 4;
      ptx::mbarrier_wait(p_full + 8 * key_warp, now.number % 2);
      if (now.number > 0) ptx::mbarrier_wait(ds_empty, (now.number - 1) % 2);
#pragma unroll
      for (int k = 0; k < kN / 2; ++k) {
        const float2 delta[2] = {ptx::load_shared_8(deltas + k * 64),
                                 ptx::load_shared_8(deltas + k * 64 + 32)};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const uint4 hand = load_hand(m, split * (kN / 2) + k);
          const uint32_t words[] = {hand.x, hand.y, hand.z, hand.w};
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            const float* pair = &x[m][2 * k + w / 2][w % 2 * 2];
            const float2 d = delta[w / 2], prob = ptx::unpack<DataType::kFloat16>(words[w]);
            const uint32_t ds = ptx::pack<kType>(prob.x * fmaf(pair[0], kProbabilityUnit, -d.x),
                                                 prob.y * fmaf(pair[1], kProbabilityUnit, -d.y));
            if constexpr (kSplit == 1) own[k][m][w] = ds;
            const int chunk = split * (kCols / 8) + 2 * k + w / 2;
            ptx::store_shared(
                smem_ds + (m * kStride + w % 2 * 8) * 128 + swizzle(row, chunk) + lane % 4 * 4,
                ds);
          }
        }
      }
      ptx::mbarrier_arrive(ds_full);
      ptx::mbarrier_wait(q_full + 8 * now.stage, now.parity);
      if constexpr (kSplit == 1) {
        accumulate(smem_q + now.stage * kQBytes, [&](int k, uint32_t (&a)[kM][4]) {
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int w = 0; w < 4; ++w) a[m][w] = own[k][m][w];
        });
      } else {
        const uint32_t l = ptx::opaque(lane);
        const uint32_t a_address = smem_ds + key_warp * 2048 + swizzle(l % 16, l / 16);
        ptx::mbarrier_wait(ds_full, now.number % 2);
        accumulate(smem_q + now.stage * kQBytes, [&](int k, uint32_t (&a)[kM][4]) {
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            ptx::load_matrix_x4(a[m], (a_address ^ k << 5) + m * kStride * 128);
          }
        });
      }
      ptx::mbarrier_arrive(empty + 8 * now.stage);
      add_dquery(now);
    }
  }

  // dV leaves through V's place, dK through K's. Rows past the length saw nothing and are 0.
  __syncthreads();
  const float unit = p_role ? kProbabilityUnit : scale;
  const uint32_t smem_out = (p_role ? smem_v : smem_k) + split * (kAccCols / 64) * kPanelKv;
  const uint32_t row = key_offset + lane / 4;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int j = 0; j < kAccCols / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        ptx::store_shared(smem_out + j / 8 * kPanelKv + (m * kStride + 8 * r) * 128 +
                              swizzle(row, j % 8) + lane % 4 * 4,
                          ptx::pack<kType>(acc[m][j][2 * r] * unit, acc[m][j][2 * r + 1] * unit));
      }
  __syncwarp();
  char* target = static_cast<char*>(p_role ? p.dvalue : p.dkey);
  const Strides& stride = p_role ? p.dvalue_stride : p.dkey_stride;
  target += 2 * (work.batch * stride.batch + work.head_kv * stride.head + split * kAccCols);
  const int columns = (p_role ? p.head_dim_v : p.head_dim) - split * kAccCols;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int first = m * kStride + key_offset;  // of 16 rows
    TileCopy<16, kAccCols, kTileKv, 32>::store(smem_out + first * 128, target, 2 * stride.row,
                                               work.key0 + first, lane,
                                               p.seq_kv - work.key0 - first, columns);
  }
}

template <int kHeadDim, DataType kType, int... kTiles>
const void* find_backward(int tile, bool general, std::integer_sequence<int, kTiles...>) {
  const void* found = nullptr;
  const auto consider = [&](auto candidate) {
    constexpr int kTile = decltype(candidate)::value;
    if constexpr (kBackwardTiles[kTile].head_dim == kHeadDim) {
      if (tile == kTile) {
        found = general ? reinterpret_cast<const void*>(&backward<kTile, kType, true>)
                        : reinterpret_cast<const void*>(&backward<kTile, kType, false>);
      }
    }
  };
  (consider(std::integral_constant<int, kTiles>{}), ...);
  return found;
}

template <int kHeadDim, DataType kType>
const void* backward_kernel(int tile, bool general) {
  return find_backward<kHeadDim, kType>(tile, general,
                                        std::make_integer_sequence<int, kBackwardTileCount>{});
}

}  // namespace flash2::sm80
