// FlashAttention-2's forward for compute capability 8.0 and newer.
//
//   a block computes one tile of query rows of one head:
//     for each block of keys that the mask leaves, those that need a mask first:
//       S = Q K^T                       when K and V have landed
//       start the copies of the next K and V
//       m' = max(m, rowmax S); if some m moved: O, l *= exp2(c m - c m')
//       P = exp2(c S - c m'); l += rowsum P; O += P V    by slices of 16 keys: the exponentials of
//         one slice run beside the tensor cores' work on the one before
//     out = O / l, lse = m + log l      (softmax.cuh has the rule for a row that saw no key)
//
// Roles: all warps are alike. A warp owns 16 * row_blocks rows of Q and O with the whole of
// head_dim; it copies its own rows of Q, its share of K and V, and meets the others only there.
// Barriers, one of each per stage, all threads arrive: `full`, once one's copies have landed, and
// `empty`, once one has read the stage. With no __syncthreads in the loop and the copies started
// half-way through a step, warps drift apart and fill each other's gaps.
// Shared memory: Q (later out), two stages of K and V (copies.cuh has the layout), barriers.
#pragma once

#include <cstdint>
#include <utility>

#include "mask.cuh"
#include "problem.h"
#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "scheduler.cuh"
#include "scores.cuh"
#include "segments.cuh"
#include "sm80/copies.cuh"
#include "sm80/kernels.h"
#include "sm80/tiles.h"
#include "softmax.cuh"

namespace flash2::sm80 {

// kGeneral: with soft cap, ALiBi or segment ids.
template <int kTile, DataType kType, bool kGeneral>
__device__ __forceinline__ void attend_tile(const ForwardParams& params, uint32_t tile) {
  constexpr ForwardTile kT = kForwardTiles[kTile];
  constexpr int kD = kT.head_dim, kTileQ = kT.tile_q(), kTileKv = kT.tile_kv;
  constexpr int kThreads = kT.threads(), kWarpRows = kT.warp_rows();
  constexpr int kM = kT.row_blocks, kRows = 2 * kM;  // a thread's rows: 8 r + lane / 4
  constexpr int kN = kTileKv / 16, kSteps = kD / 16;
  constexpr int kQ = kGeneral && kT.q_steps < kSteps ? 0 : kT.q_steps;
  constexpr uint32_t kPanelQ = kTileQ * 128, kPanelKv = kTileKv * 128;
  constexpr uint32_t kKvBytes = kTileKv * kD * 2, kStageBytes = 2 * kKvBytes;
  using CopyQ = TileCopy<kWarpRows, kD, kTileQ, 32>;
  using CopyKv = TileCopy<kTileKv, kD, kTileKv, kThreads>;
  using Scores = float[kM][kTileKv / 8][4];
  extern __shared__ __align__(1024) char shared_memory[];
  const uint32_t smem_q = ptx::shared_address(shared_memory);
  const uint32_t smem_kv = smem_q + kTileQ * kD * 2;
  const uint32_t full = smem_kv + 2 * kStageBytes, empty = full + 16;

  const ForwardProblem& p = params.problem;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      ptx::mbarrier_init(full + 8 * stage, kThreads);
      ptx::mbarrier_init(empty + 8 * stage, kThreads);
    }
  }
  __syncthreads();

  ForwardWork<kTileQ, kTileKv> work(params, tile);
  const int warp_row = warp * kWarpRows, row0 = work.row0 + warp_row;  // of the warp
  const int row_end = min(row0 + kWarpRows, work.q_length);
  const uint32_t smem_rows = smem_q + warp_row * 128;
  CopyQ::load(smem_rows,
              static_cast<const char*>(p.query) +
                  2 * (work.batch * p.query_stride.batch + work.head * p.query_stride.head),
              2 * p.query_stride.row, row0, lane, work.q_length - row0, p.head_dim);
  ptx::copy_async_commit();

  const int* query_ids = nullptr;
  const int* key_ids = nullptr;
  if constexpr (kGeneral) {
    if (p.query_segment_ids.data) {
      query_ids = p.query_segment_ids.row(work.batch);
      key_ids = p.key_value_segment_ids.row(work.batch);
      const int top = work.range.top * kTileKv;
      work.range.narrow(segment_keys<kT.warps>(
          query_ids, key_ids, work.row0, min(work.row0 + kTileQ, work.q_length) - 1,
          top - work.range.total * kTileKv, min(top, work.visibility.kv_length), smem_kv));
    }
  }

  // Step n of the main loop reads stage n % 2 in that stage's phase n / 2 % 2.
  const auto copy_kv = [&](int step) {
    if (step >= work.range.total) return;
    const uint32_t stage = step % 2, target = smem_kv + stage * kStageBytes;
    const uint32_t thread = ptx::opaque(threadIdx.x);
    const int first = work.range.block(step) * kTileKv, rows = work.visibility.kv_length - first;
    ptx::mbarrier_wait(empty + 8 * stage, (step / 2 + 1) % 2);
    CopyKv::load(target, work.key, 2 * p.key_stride.row, first, thread, rows, p.head_dim);
    CopyKv::load(target + kKvBytes, work.value, 2 * p.value_stride.row, first, thread, rows,
                 p.head_dim_v);
    ptx::mbarrier_arrive_after_copies(full + 8 * stage);
  };
  copy_kv(0);

  const uint32_t q_address = smem_rows + swizzle(lane % 16, lane / 16);
  const auto load_q = [&](uint32_t (&a)[kM][4], int k) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      ptx::load_matrix_x4(a[m], (q_address ^ k % 4 << 5) + k / 4 * kPanelQ + m * 2048);
    }
  };

  float scale = p.scale;
  if (p.scale_operand.data) scale *= p.scale_operand.at(work.batch);
  const float factor = kGeneral ? kLog2E : score_factor(scale);
  ptx::copy_async_wait<0>();
  __syncwarp();
  if (scale < 0.0f) {  // the softmax wants a positive factor: flip the sign of the warp's rows
    for (int i = lane; i < kWarpRows * kD / 2; i += 32) {
      const uint32_t address =
          smem_rows + i / 32 / kWarpRows * kPanelQ + i / 32 % kWarpRows * 128 + lane * 4;
      ptx::store_shared(address, ptx::load_shared(address) ^ 0x80008000u);
    }
    __syncwarp();
  }
  uint32_t q[kQ > 0 ? kQ : 1][kM][4];
#pragma unroll
  for (int k = 0; k < kQ; ++k) load_q(q[k], k);

  IdRange warp_ids;
  float slope = 0.0f;
  if constexpr (kGeneral) {
    if (query_ids) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = row0 + r * 8 + lane / 4;
        if (row < work.q_length) warp_ids.add(query_ids[row]);
      }
      warp_ids.join_warp();
    }
    if (p.alibi_slopes.data) slope = p.alibi_slopes.at(work.batch, work.head);
  }

  float o[kM][kD / 8][4];
  OnlineSoftmax<kRows> softmax;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[m][j][i] = 0.0f;

  // In both products a lane's addresses are made anew, since no register is left to keep them in:
  // A and the transposed B have their second matrix 8 rows below, B has it 8 columns to the right,
  // and a step of 16 columns flips bits of the swizzled chunk.
  const auto multiply_qk = [&](Scores& s, uint32_t stage) {
    const uint32_t l = ptx::opaque(lane);
    const uint32_t k_address =
        smem_kv + stage * kStageBytes + swizzle(l % 8 + l / 16 * 8, l / 8 % 2);
    uint32_t a[2][kM][4], b[2][kN][4];  // fragments of Q and K, loaded one column step ahead
    const auto load = [&](int k) {
      if (k >= kQ) load_q(a[k % 2], k);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        ptx::load_matrix_x4(b[k % 2][j], (k_address ^ k % 4 << 5) + k / 4 * kPanelKv + j * 2048);
      }
    };
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int j = 0; j < kTileKv / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][j][i] = 0.0f;
    load(0);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k + 1 < kSteps) load(k + 1);
      const uint32_t (&q_k)[kM][4] = k < kQ ? q[k < kQ ? k : 0] : a[k % 2];
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::mma_16x8x16<kType>(s[m][2 * j], q_k[m], b[k % 2][j][0], b[k % 2][j][1]);
          ptx::mma_16x8x16<kType>(s[m][2 * j + 1], q_k[m], b[k % 2][j][2], b[k % 2][j][3]);
        }
    }
  };

  const auto multiply_pv = [&](Scores& s, uint32_t stage) {
    const uint32_t l = ptx::opaque(lane);
    const uint32_t v_address = smem_kv + stage * kStageBytes + kKvBytes + swizzle(l % 16, l / 16);
    float base[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) base[r] = softmax.base(r, factor);
#pragma unroll
    for (int slice = 0; slice < kN; ++slice) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const int r = 2 * m + w % 2;
          const float* pair = &s[m][2 * slice + w / 2][w % 2 * 2];
          const float low = ptx::exp2(fmaf(pair[0], factor, -base[r]));
          const float high = ptx::exp2(fmaf(pair[1], factor, -base[r]));
          softmax.sum[r] += low + high;
          a[m][w] = ptx::pack<kType>(low, high);
        }
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        uint32_t b[4];
        ptx::load_matrix_x4_transposed(b,
                                       (v_address ^ j % 4 << 5) + j / 4 * kPanelKv + slice * 2048);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::mma_16x8x16<kType>(o[m][2 * j], a[m], b[0], b[1]);
          ptx::mma_16x8x16<kType>(o[m][2 * j + 1], a[m], b[2], b[3]);
        }
      }
    }
  };

  // One block of keys; `adjust` changes and masks its scores.
  const auto attend = [&](int step, auto adjust) {
    const uint32_t stage = step % 2;
    Scores s;
    ptx::mbarrier_wait(full + 8 * stage, step / 2 % 2);
    multiply_qk(s, stage);
    copy_kv(step + 1);
    adjust(s);
    float largest[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      largest[r] = s[r / 2][0][r % 2 * 2];
#pragma unroll
      for (int j = 0; j < kTileKv / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) largest[r] = fmaxf(largest[r], s[r / 2][j][r % 2 * 2 + i]);
    }
    softmax.raise(largest, factor, [&](int r, float decay) {
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
        o[r / 2][j][r % 2 * 2] *= decay;
        o[r / 2][j][r % 2 * 2 + 1] *= decay;
      }
    });
    multiply_pv(s, stage);
  };
  const auto leave = [&](int step) { ptx::mbarrier_arrive(empty + 8 * (step % 2)); };

  int step = 0;
#pragma unroll 1
  for (; step < (kGeneral ? work.range.total : work.range.masked()); ++step) {
    const int first_key = work.range.block(step) * kTileKv, end_key = first_key + kTileKv;
    const Interval lowest = work.visibility.row(p, row0);
    const Interval highest = work.visibility.row(p, row_end - 1);
    const bool cut_above = end_key > lowest.end;
    const bool cut_below = first_key < highest.begin;
    bool needed = row0 < row_end && highest.end > first_key && lowest.begin < end_key;
    IdRange block_ids;
    if constexpr (kGeneral) {
      if (query_ids) {
        for (int key = first_key + lane; key < end_key; key += 32) {
          if (key < work.visibility.kv_length) block_ids.add(key_ids[key]);
        }
        block_ids.join_warp();
        needed &= !block_ids.disjoint(warp_ids);
      }
    }
    if (needed) {
      attend(step, [&](Scores& s) {
        if constexpr (kGeneral) {
          modify_scores<kM, kTileKv>(s, fabsf(scale), p.soft_cap, slope,
                                     row0 + work.visibility.offset - first_key);
          if (query_ids && !(block_ids.single() && warp_ids.single())) {
            mask_ids<kM, kTileKv>(s, query_ids + row0, work.q_length - row0, key_ids + first_key,
                                  work.visibility.kv_length - first_key);
          }
        }
        if (cut_above) {
          mask_columns<kM, kTileKv, true>(
              s, [&](int r) { return work.visibility.row(p, row0 + r).end - first_key; });
        }
        if (cut_below) {
          mask_columns<kM, kTileKv, false>(
              s, [&](int r) { return work.visibility.row(p, row0 + r).begin - first_key; });
        }
      });
    } else {  // none of the warp's rows sees a key: it only keeps the pipeline going
      copy_kv(step + 1);
      ptx::mbarrier_wait(full + 8 * (step % 2), step / 2 % 2);
    }
    leave(step);
  }
  if constexpr (!kGeneral) {
#pragma unroll 1
    for (; step < work.range.total; ++step) {
      attend(step, [](Scores&) {});
      leave(step);
    }
  }

  // Epilogue: through the warp's rows of Q, which nobody else reads.
  const bool has_sink = p.sinks.data != nullptr;
  const float sink = has_sink ? p.sinks.at(work.batch, work.head) : 0.0f;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = row0 + r * 8 + lane / 4;
    float lse;
    const float norm = softmax.finish(r, row < work.q_length, factor, has_sink, sink, &lse);
    if (p.lse && lane % 4 == 0 && row < p.seq_q) {
      p.lse[(int64_t{work.batch} * p.heads_q + work.head) * p.seq_q + row] = lse;
    }
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
      const float low = norm == 0.0f ? 0.0f : o[r / 2][j][r % 2 * 2] * norm;
      const float high = norm == 0.0f ? 0.0f : o[r / 2][j][r % 2 * 2 + 1] * norm;
      ptx::store_shared(
          smem_rows + j / 8 * kPanelQ + swizzle(r * 8 + lane / 4, j % 8) + lane % 4 * 4,
          ptx::pack<kType>(low, high));
    }
  }
  __syncwarp();
  CopyQ::store(smem_rows,
               static_cast<char*>(p.out) +
                   2 * (work.batch * p.out_stride.batch + work.head * p.out_stride.head),
               2 * p.out_stride.row, row0, lane, p.seq_q - row0, p.head_dim_v);
  if constexpr (kGeneral) {  // for the block's next tile
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 0; i < 4; ++i) ptx::mbarrier_invalidate(full + 8 * i);
    }
  }
}

template <int kTile, DataType kType, bool kGeneral>
__global__ void __launch_bounds__(kForwardTiles[kTile].threads(),
                                  kForwardTiles[kTile].blocks_per_sm)
    forward(const __grid_constant__ ForwardParams params) {
  if constexpr (kGeneral) {  // one tile each, but where the grid is small (ForwardPlan::otherwise)
    if (!has_work<80>(params.problem)) return;
    const uint32_t tiles = params.tiles_q * params.all_packs;
#pragma unroll 1
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      attend_tile<kTile, kType, true>(params, tile);
    }
  } else {
    attend_tile<kTile, kType, false>(params, blockIdx.x);
  }
}

template <int kHeadDim, DataType kType, int... kTiles>
const void* find_forward(int tile, bool general, std::integer_sequence<int, kTiles...>) {
  const void* found = nullptr;
  const auto consider = [&](auto candidate) {
    constexpr int kTile = decltype(candidate)::value;
    if constexpr (kForwardTiles[kTile].head_dim == kHeadDim) {
      if (tile == kTile) {
        found = general ? reinterpret_cast<const void*>(&forward<kTile, kType, true>)
                        : reinterpret_cast<const void*>(&forward<kTile, kType, false>);
      }
    }
  };
  (consider(std::integral_constant<int, kTiles>{}), ...);
  return found;
}

template <int kHeadDim, DataType kType>
const void* forward_kernel(int tile, bool general) {
  return find_forward<kHeadDim, kType>(tile, general,
                                       std::make_integer_sequence<int, kForwardTileCount>{});
}

}  // namespace flash2::sm80
