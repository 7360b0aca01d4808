// FlashAttention-2's backward for compute capability 8.0 and newer: the main kernels.
//
//   a block computes dK and dV of one tile of keys of one key head:
//     for each query head of the group, for each tile of queries that sees the keys, last first:
//       P^T  = exp2(c K Q^T - lse2)        dV += P^T dO
//       dS^T = P^T * (V dO^T - delta)      dK += dS^T Q
//       dQ  += dS K                        added to float32 sums in global memory
//
// Transposed products leave P^T and dS^T where the next product wants its A operand, in registers.
// Only dS goes through shared memory, to all warps, which split dQ among them. P travels times
// 2^12 (backward_rows.h).
//
// backward_alike, for head_dim 64, where dK and dV of 32 keys fit one warp's registers: four warps
// that do everything, two blocks per multiprocessor. dQ of a step waits for the middle of the
// next, when all have long left their dS, so a step has no other meeting than that one. Barriers:
// `full` per stage, for the copies, and `ds_full`; whoever has passed ds_full of step n knows that
// all are done with the stage of step n and with dQ of step n - 1.
//
// backward_roles, for more: warps 0 to 3 own P and dV, warps 4 to 7 own dS and dK; a warp of each
// makes a pair that holds the same keys and shares a sub-core. P^T goes from the one to the other
// through shared memory, as float16. The roles run half a step apart: while P is exponentiated
// dP^T is multiplied, and so on; the P warps compute their dQ at the start of the next step.
// Barriers: per stage `q_full` (Q, logsumexps; copied by the P warps), `do_full` (dO, deltas; by
// the dS warps) and `empty`; `p_full` per keys of a warp; `ds_full` and `ds_empty`. P needs no
// `empty`: who writes P of the next step has waited for dS of this one.
#pragma once

#include <cstdint>
#include <utility>

#include "sm80/backward_block.cuh"
#include "sm80/kernels.h"

namespace flash2::sm80 {

template <int kTile, DataType kType, bool kGeneral>
__global__ void __launch_bounds__(128, 2)
    backward_alike(const __grid_constant__ BackwardParams params) {
  using Block = BackwardBlock<kTile, kType, kGeneral>;
  constexpr int kM = Block::kM, kSlices = Block::kN / 2;
  static_assert(Block::kSplit == 1 && Block::kStages == 2 && Block::kT.roles == 1);
  if constexpr (kGeneral) {
    if (!has_work<80>(params.problem)) return;
  }
  extern __shared__ __align__(1024) char shared_memory[];
  const Block block(params, ptx::shared_address(shared_memory));
  const uint32_t full = block.barriers, ds_full = full + 16;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 128);
    ptx::mbarrier_init(full + 8, 128);
    ptx::mbarrier_init(ds_full, 128);
  }
  __syncthreads();

  typename Block::Step now = block.first_step(), next = now, last = now;
  const auto copy_next = [&] {
    if (next.number >= block.total) return;
    block.copy_rows(next, true);
    block.copy_rows(next, false);
    ptx::mbarrier_arrive_after_copies(full + 8 * next.stage);
    block.advance(next);
  };
  if (block.total > 0) {
    block.copy_keys(true);
    block.copy_keys(false);
    copy_next();
    copy_next();
  }
  const auto ds_of = [&](const typename Block::Step& at) {
    return block.ds + at.number % 2 * Block::kDsBytes;
  };

  typename Block::Gradient dk, dv;
  clear(dk);
  clear(dv);
  const float factor = block.factor();
#pragma unroll 1
  for (; now.number < block.total; block.advance(now)) {
    const uint32_t smem_q = block.q + now.stage * Block::kQBytes;
    const uint32_t smem_do = block.dout + now.stage * Block::kQBytes;
    ptx::mbarrier_wait(full + 8 * now.stage, now.parity);
    uint32_t hand[kSlices][kM][4];  // P, for dS
    const auto probabilities = [&](auto adjust) {
      typename Block::Scores s;
      block.multiply_scores(s, block.k, smem_q);
      adjust(s);
      const auto exponential = block.exponential(now, factor);
      block.accumulate(dv, smem_do, [&](int step, uint32_t (&a)[kM][4]) {
        const typename Block::RowPairs lses(exponential.lse, step);
#pragma unroll
        for (int m = 0; m < kM; ++m) exponential(s, lses, step, m, a[m], hand[step][m]);
      });
    };
    const auto cut = block.cut(now);
    if (kGeneral || cut.above || cut.below) {
      probabilities([&](typename Block::Scores& s) { block.adjust(s, now, cut); });
    } else {
      probabilities([](typename Block::Scores&) {});
    }
    if (now.number > 0) {
      ptx::mbarrier_wait(ds_full, last.number % 2);
      copy_next();
      block.add_dquery(last, ds_of(last), [] {});
    }
    typename Block::Scores dp;
    block.multiply_scores(dp, block.v, smem_do);
    const uint32_t deltas = block.deltas(now);
    block.accumulate(dk, smem_q, [&](int step, uint32_t (&a)[kM][4]) {
      const typename Block::RowPairs delta(deltas, step);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        block.score_gradients(dp, delta, step, m, hand[step][m], ds_of(now), a[m]);
      }
    });
    ptx::mbarrier_arrive(ds_full);
    last = now;
  }
  if (block.total > 0) {
    ptx::mbarrier_wait(ds_full, last.number % 2);
    block.add_dquery(last, ds_of(last), [] {});
  }
  __syncthreads();
  block.store(dv, kProbabilityUnit, false);
  block.store(dk, block.scale(), true);
  block.finish_rows();
}

template <int kTile, DataType kType, bool kGeneral>
__global__ void __launch_bounds__(256, 1)
    backward_roles(const __grid_constant__ BackwardParams params) {
  using Block = BackwardBlock<kTile, kType, kGeneral>;
  using Step = typename Block::Step;
  using Scores = typename Block::Scores;
  constexpr int kM = Block::kM, kSlices = Block::kN / 2;  // of 16 queries, of a warp
  constexpr int kStages = Block::kStages, kSplit = Block::kSplit;
  static_assert(Block::kT.roles == 2);
  if constexpr (kGeneral) {
    if (!has_work<80>(params.problem)) return;
  }
  extern __shared__ __align__(1024) char shared_memory[];
  const Block block(params, ptx::shared_address(shared_memory));
  const bool p_role = block.warp < 4;
  const uint32_t q_full = block.barriers, do_full = q_full + 8 * kStages;
  const uint32_t empty = do_full + 8 * kStages, ds_full = empty + 8 * kStages;
  const uint32_t ds_empty = ds_full + 8, p_fulls = ds_empty + 8;
  const uint32_t p_full = p_fulls + 8 * block.key_warp;
  static_assert(8 * (3 * kStages + 2 + Block::kKeyWarps) <= Block::kT.barrier_bytes());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(q_full + 8 * stage, 128);
      ptx::mbarrier_init(do_full + 8 * stage, 128);
      ptx::mbarrier_init(empty + 8 * stage, 256);
    }
    ptx::mbarrier_init(ds_full, 128);
    ptx::mbarrier_init(ds_empty, 256);
    for (int w = 0; w < Block::kKeyWarps; ++w) ptx::mbarrier_init(p_fulls + 8 * w, 32 * kSplit);
  }
  __syncthreads();

  Step now = block.first_step(), next = now;
  const auto copy_next = [&] {  // the role's share
    if (next.number >= block.total) return;
    ptx::mbarrier_wait(empty + 8 * next.stage, next.parity ^ 1);
    block.copy_rows(next, p_role);
    ptx::mbarrier_arrive_after_copies((p_role ? q_full : do_full) + 8 * next.stage);
    block.advance(next);
  };
  if (block.total > 0) {
    block.copy_keys(p_role);
    for (int i = 0; i < kStages - 1; ++i) copy_next();
  }
  // P^T, 16 keys by 16 queries at a time, lies in the order of A operands.
  const auto hand_address = [&](int m, int step) {
    const int number = (m * Block::kKeyWarps + block.key_warp) * (Block::kTileQ / 16) + step;
    return block.hand + (number * 32 + block.lane) * 16;
  };
  const auto load_words = [&](uint32_t address, uint32_t (&words)[4]) {
    const uint4 w = ptx::load_shared_16(address);
    words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
  };
  // Where warps split the queries, P^T as dV wants it lies beside what dS wants.
  constexpr uint32_t kBeside = 2 * Block::kTileKv * Block::kTileQ;
  const auto add_dquery = [&](const Step& at) {
    ptx::mbarrier_wait(ds_full, at.number % 2);
    block.add_dquery(at, block.ds, [&] { ptx::mbarrier_arrive(ds_empty); });
  };

  typename Block::Gradient gradient;  // dV or dK
  clear(gradient);
  // P^T or dS^T as an A operand, where the warp has all of its queries.
  uint32_t own[kSplit == 1 ? kSlices : 1][kM][4];
  const auto keep_own = [&](int step, int m, const uint32_t (&words)[4]) {
    if constexpr (kSplit == 1) {
#pragma unroll
      for (int w = 0; w < 4; ++w) own[step][m][w] = words[w];
    }
  };
  const auto load_own = [&](int step, uint32_t (&a)[kM][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int w = 0; w < 4; ++w) a[m][w] = own[step][m][w];
  };

  if (p_role) {
    const float factor = block.factor();
    Step last = now;
    const auto probabilities = [&](auto adjust) {
      Scores s;
      block.multiply_scores(s, block.k, block.q + now.stage * Block::kQBytes);
      if constexpr (kStages > 1) copy_next();
      adjust(s);
      if (kSplit > 1 && now.number > 0) ptx::mbarrier_wait(ds_empty, (now.number - 1) % 2);
      const auto exponential = block.exponential(now, factor);
#pragma unroll
      for (int step = 0; step < kSlices; ++step) {
        const typename Block::RowPairs lses(exponential.lse, step);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          uint32_t a[4], hand[4];
          exponential(s, lses, step, m, a, hand);
          keep_own(step, m, a);
          const uint32_t address = hand_address(m, block.split * kSlices + step);
          ptx::store_shared_16(address, uint4{hand[0], hand[1], hand[2], hand[3]});
          if constexpr (kSplit > 1) {
            ptx::store_shared_16(address + kBeside, uint4{a[0], a[1], a[2], a[3]});
          }
        }
      }
    };
#pragma unroll 1
    for (; now.number < block.total; block.advance(now)) {
      if (now.number > 0) add_dquery(last);
      last = now;
      if constexpr (kStages == 1) copy_next();
      ptx::mbarrier_wait(q_full + 8 * now.stage, now.parity);
      const auto cut = block.cut(now);
      if (kGeneral || cut.above || cut.below) {
        probabilities([&](Scores& s) { block.adjust(s, now, cut); });
      } else {
        probabilities([](Scores&) {});
      }
      ptx::mbarrier_arrive(p_full);
      ptx::mbarrier_wait(do_full + 8 * now.stage, now.parity);
      const uint32_t smem_do = block.dout + now.stage * Block::kQBytes;
      if constexpr (kSplit == 1) {
        block.accumulate(gradient, smem_do, load_own);
      } else {
        ptx::mbarrier_wait(p_full, now.number % 2);
        block.accumulate(gradient, smem_do, [&](int step, uint32_t (&a)[kM][4]) {
#pragma unroll
          for (int m = 0; m < kM; ++m) load_words(hand_address(m, step) + kBeside, a[m]);
        });
      }
      ptx::mbarrier_arrive(empty + 8 * now.stage);
    }
    if (block.total > 0) add_dquery(last);
  } else {
#pragma unroll 1
    for (; now.number < block.total; block.advance(now)) {
      copy_next();
      Scores dp;
      ptx::mbarrier_wait(do_full + 8 * now.stage, now.parity);
      block.multiply_scores(dp, block.v, block.dout + now.stage * Block::kQBytes);
      ptx::mbarrier_wait(p_full, now.number % 2);
      if (now.number > 0) ptx::mbarrier_wait(ds_empty, (now.number - 1) % 2);
      const uint32_t deltas = block.deltas(now);
      uint32_t hand[kSlices][kM][4];
#pragma unroll
      for (int step = 0; step < kSlices; ++step)
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          load_words(hand_address(m, block.split * kSlices + step), hand[step][m]);
        }
#pragma unroll
      for (int step = 0; step < kSlices; ++step) {
        const typename Block::RowPairs delta(deltas, step);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          uint32_t a[4];
          block.score_gradients(dp, delta, step, m, hand[step][m], block.ds, a);
          keep_own(step, m, a);
        }
      }
      ptx::mbarrier_arrive(ds_full);
      ptx::mbarrier_wait(q_full + 8 * now.stage, now.parity);
      const uint32_t smem_q = block.q + now.stage * Block::kQBytes;
      if constexpr (kSplit == 1) {
        block.accumulate(gradient, smem_q, load_own);
      } else {
        const uint32_t l = ptx::opaque(block.lane);
        const uint32_t address = block.ds + block.key_warp * 2048 + swizzle(l % 16, l / 16);
        ptx::mbarrier_wait(ds_full, now.number % 2);
        block.accumulate(gradient, smem_q, [&](int step, uint32_t (&a)[kM][4]) {
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            ptx::load_matrix_x4(a[m], (address ^ step << 5) + m * Block::kStride * 128);
          }
        });
      }
      ptx::mbarrier_arrive(empty + 8 * now.stage);
      add_dquery(now);
    }
  }
  __syncthreads();
  block.store(gradient, p_role ? kProbabilityUnit : block.scale(), !p_role);
  block.finish_rows();
}

template <int kTile, DataType kType, bool kGeneral>
const void* backward_of_tile() {
  if constexpr (kBackwardTiles[kTile].roles == 1) {
    return reinterpret_cast<const void*>(&backward_alike<kTile, kType, kGeneral>);
  } else {
    return reinterpret_cast<const void*>(&backward_roles<kTile, kType, kGeneral>);
  }
}

template <int kHeadDim, DataType kType, int... kTiles>
const void* find_backward(int tile, bool general, std::integer_sequence<int, kTiles...>) {
  const void* found = nullptr;
  const auto consider = [&](auto candidate) {
    constexpr int kTile = decltype(candidate)::value;
    if constexpr (kBackwardTiles[kTile].head_dim == kHeadDim) {
      if (tile == kTile) {
        found = general ? backward_of_tile<kTile, kType, true>()
                        : backward_of_tile<kTile, kType, false>();
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
