// What the two consumer warpgroups of a backward block do: all products.
//
// A consumer owns 64 of the tile's 128 keys. It computes S^T = K Q^T and dP^T = V dO^T, so that
// P^T and dS^T lie in its registers as the A operands of dV += P^T dO and dK += dS^T Q. dQ = dS K
// runs over all keys: dS goes to shared memory, and each consumer computes half of dQ, a step
// later than the rest: then the other's dS has long been there, and the two need not keep in step.
// While one computes exponentials, the other multiplies.
#pragma once

#include <cstdint>

#include "backward_rows.h"
#include "params.h"
#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/backward_memory.cuh"
#include "sm90/backward_scores.cuh"
#include "sm90/backward_work.cuh"
#include "softmax.cuh"

namespace flash2::sm90 {

template <int kTile, DataType kType>
__device__ __forceinline__ void consume(const BackwardParams& params,
                                        const BackwardMemory<kTile>& smem,
                                        const KeyTile<kTile>* tiles, int consumer, int warp) {
  constexpr BackwardTile kT = kBackwardTiles[kTile];
  constexpr int kD = kT.head_dim, kQ = kT.tile_q, kKeys = kT.tile_kv();
  constexpr int kQueryPanel = kQ * 128, kKeyPanel = kKeys * 128;
  // Halves of dQ: 64 rows each where a step has 128, else 64 columns each.
  constexpr bool kByRows = kQ == 128, kTransposed = kT.transposed();
  static_assert(kByRows ? kD == 64 : kD == 128);
  constexpr int kBlocks = kTransposed ? kQ / 8 : 8;  // of dQ, 16 x 8, in a warp
  // dQ, dV and dK of a step start together; else dK when dV is done.
  constexpr bool kTogether = kByRows || kTransposed;
  // Logsumexps come before a step's products, exponentials before the wait for dP. At head_dim 64
  // it lost 2 %: they take 32 registers there.
  constexpr bool kEarly = kD == 128;
  constexpr bool kCapped = kT.capped;
  constexpr int kBoth = 1;  // the named barrier of both consumers
  const BackwardProblem& p = params.problem;
  const int lane = threadIdx.x % 32, thread = threadIdx.x % 128;

  const uint64_t key_a = ptx::wgmma_descriptor(smem.key() + consumer * 64 * 128);
  const uint64_t value_a = ptx::wgmma_descriptor(smem.value() + consumer * 64 * 128);
  const uint64_t query_b = ptx::wgmma_descriptor(smem.query(0));
  const uint64_t dout_b = ptx::wgmma_descriptor(smem.dout(0));
  const uint64_t query_t = ptx::wgmma_descriptor(smem.query(0), kQueryPanel);
  const uint64_t dout_t = ptx::wgmma_descriptor(smem.dout(0), kQueryPanel);
  const uint64_t key_t =
      ptx::wgmma_descriptor(smem.key() + (kByRows ? 0 : consumer * kKeyPanel), kKeyPanel);
  const uint64_t ds_a = ptx::wgmma_descriptor(smem.ds(0) + (kByRows ? consumer * 64 * 128 : 0));

  float dkey[kD / 2], dvalue[kD / 2];
  float s[kQ / 2], dp[kQ / 2];
  // dQ beside both gradients lies where S was: ptxas finds no other place.
  auto& dquery_beside = reinterpret_cast<float (&)[4 * kBlocks]>(s);
  uint32_t probabilities[kQ / 16][4], ds[kQ / 16][4];
  uint32_t sloped[kCapped ? kQ / 16 : 1][4];
  Ring<2> ring, tile_ring;  // Q and dO stand at the same stage
  uint32_t ds_stage = 0, kv_parity = 0, dquery_parity = 1, odd = 0;
  const uint32_t ds_to = transposed_row(smem.ds(0) + consumer * kQueryPanel, warp, lane);

  const auto release = [&](uint32_t barrier) {
    if (lane == 0) ptx::mbarrier_arrive(barrier);
  };
  const auto wait_dquery_buffer = [&] {
    ptx::mbarrier_wait(smem.dquery_empty(consumer), dquery_parity);
  };
  // To a storer. Where they take every second step each, even and odd steps have barriers of their
  // own.
  const auto hand_over = [&] {
    __syncwarp();
    release(smem.dquery_full(consumer, odd));
    if (kT.deterministic) odd ^= 1;
  };
  // Named barriers, of a consumer and a stage of dS: its half is there, and it has read the other
  // stage. It arrives, the other one waits.
  const auto ds_ready = [&](int of, uint32_t at) { return 2 + 2 * static_cast<int>(at) + of; };
  // The other consumer has stored its dS that lies at `at`, and has read the other stage.
  const auto wait_other_ds = [&](uint32_t at, uint32_t nothing = 0) {
    ptx::barrier_sync(ds_ready(1 - consumer, at) + nothing, 256);
  };
  // dQ of the step whose dS lies at `at`.
  const auto start_dquery = [&](auto& dquery, uint32_t at) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const uint64_t rows =
          ptx::wgmma_advance(ds_a, at * kT.ds_bytes() + k / 4 * kQueryPanel + k % 4 * 32);
      const uint64_t columns = ptx::wgmma_advance(key_t, k * 2048);
      if constexpr (kTransposed) {
        ptx::wgmma<kType, true, false>(dquery, columns, rows, k != 0);
      } else {
        ptx::wgmma<kType, false, true>(dquery, rows, columns, k != 0);
      }
    }
    ptx::wgmma_commit();
  };
  const auto hand_dquery_over = [&](auto& dquery) {
    ptx::pin(dquery);
    wait_dquery_buffer();
    dquery_parity ^= 1;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      ptx::store_shared_16(
          smem.dquery(consumer) + (warp * kBlocks + i) * 512 + lane * 16,
          words_of(dquery[4 * i], dquery[4 * i + 1], dquery[4 * i + 2], dquery[4 * i + 3]));
    }
    hand_over();
  };

  // One query tile. kCut: some row of it does not see some key. kFirst: of the key tile.
  const auto step = [&](int query_tile, auto cut, auto first, const auto& tile, float factor) {
    constexpr bool kCut = decltype(cut)::value, kFirst = decltype(first)::value;
    const uint32_t stage = ring.stage, shift = stage * kT.stage_bytes();
    ptx::mbarrier_wait(smem.query_full(stage), ring.parity);
    float2 lse2[kQ / 8], delta[kQ / 8];
    // A load behind products in the queue waits until these have read their operands.
    if constexpr (kEarly) load_columns(lse2, smem.lse2(stage));
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      const int inside = k % 4 * 32;
      ptx::wgmma<kType, false, false>(
          s, ptx::wgmma_advance(key_a, k / 4 * kKeyPanel + inside),
          ptx::wgmma_advance(query_b, shift + k / 4 * kQueryPanel + inside), k != 0);
    }
    ptx::wgmma_commit();
    ptx::mbarrier_wait(smem.dout_full(stage), ring.parity);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      const int inside = k % 4 * 32;
      ptx::wgmma<kType, false, false>(
          dp, ptx::wgmma_advance(value_a, k / 4 * kKeyPanel + inside),
          ptx::wgmma_advance(dout_b, shift + k / 4 * kQueryPanel + inside), k != 0);
    }
    ptx::wgmma_commit();

    ptx::wgmma_wait<1>();
    ptx::pin(s);
    if constexpr (!kEarly) load_columns(lse2, smem.lse2(stage));
    uint32_t bits;
    if constexpr (kCapped) {
      to_capped<kType>(s, lse2, SoftCap(p.soft_cap, tile.scale), probabilities, sloped);
      bits = bits_of(sloped);
    } else {
      to_probabilities(s, lse2, factor);
      bits = bits_of(s);
    }
    // Depends on all exponentials, but only in name: the assembler, which lifts the wait for dP
    // over arithmetic, cannot lift it over a barrier.
    if constexpr (kEarly && !kFirst) wait_other_ds(ds_stage ^ 1, bits & params.zero);
    ptx::wgmma_wait<0>();
    ptx::pin(dp);
    load_columns(delta, smem.delta(stage));
    if constexpr (kCapped) {
      to_dscores<kType>(sloped, dp, delta, ds);
    } else {
      to_dscores<kType>(s, dp, delta, ds);
      pack_all<kType>(s, probabilities);
    }
    // Here, where scores and dP are gone: ptxas has no registers for it before.
    if constexpr (kCut) {
      uint32_t visible[2];
      find_visible(visible, p, tile, tile.first_key() + consumer * 64 + warp * 16 + lane / 4,
                   query_tile * kQ);
      mask_operand(probabilities, visible);
      mask_operand(ds, visible);
    }
    if constexpr (!kEarly && !kFirst) wait_other_ds(ds_stage ^ 1);
    // For dQ, which reads dS of the step before. Its writers would wait for their stores; here
    // nothing is under way. (In a first step it has no purpose: without it there, C7511.)
    ptx::fence_async_shared();
#pragma unroll
    for (int k = 0; k < kQ / 16; ++k) {
      ptx::store_matrix_x4_transposed(ds_to + ds_stage * kT.ds_bytes() + k * 2048, ds[k]);
    }

    const auto start_dvalue = [&] {
#pragma unroll
      for (int k = 0; k < kQ / 16; ++k) {
        ptx::wgmma<kType, true>(dvalue, probabilities[k],
                                ptx::wgmma_advance(dout_t, shift + k * 2048), !kFirst || k != 0);
      }
      ptx::wgmma_commit();
    };
    const auto start_dkey = [&] {
#pragma unroll
      for (int k = 0; k < kQ / 16; ++k) {
        ptx::wgmma<kType, true>(dkey, ds[k], ptx::wgmma_advance(query_t, shift + k * 2048),
                                !kFirst || k != 0);
      }
      ptx::wgmma_commit();
    };
    ptx::wgmma_fence();
    if constexpr (kFirst) {
      start_dvalue();
      start_dkey();
      ptx::barrier_arrive(ds_ready(consumer, ds_stage), 256);
      ptx::wgmma_wait<1>();
      release(smem.dout_empty(stage));
    } else if constexpr (kTogether && !kCut) {
      start_dquery(dquery_beside, ds_stage ^ 1);
      ptx::wgmma_fence();
      start_dvalue();
      start_dkey();
      ptx::wgmma_wait<2>();
      ptx::barrier_arrive(ds_ready(consumer, ds_stage), 256);
      hand_dquery_over(dquery_beside);
      ptx::wgmma_wait<1>();
      release(smem.dout_empty(stage));
    } else {
      start_dvalue();
      float dquery[4 * kBlocks];
      start_dquery(dquery, ds_stage ^ 1);
      ptx::wgmma_wait<1>();
      release(smem.dout_empty(stage));
      start_dkey();
      ptx::wgmma_wait<1>();
      ptx::barrier_arrive(ds_ready(consumer, ds_stage), 256);
      hand_dquery_over(dquery);
    }
    ptx::wgmma_wait<0>();
    release(smem.query_empty(stage));
    ring.next();
    ds_stage ^= 1;
  };
  // dQ of a tile's last step.
  const auto finish = [&] {
    wait_other_ds(ds_stage ^ 1);
    ptx::fence_async_shared();
    start_dquery(dquery_beside, ds_stage ^ 1);
    ptx::wgmma_wait<0>();
    hand_dquery_over(dquery_beside);
  };

  for (;;) {
    ptx::mbarrier_wait(smem.tile_full(tile_ring.stage), tile_ring.parity);
    const auto& tile = tiles[tile_ring.stage];
    if (uniform(tile.block) < 0) break;
    const int begin = uniform(tile.begin), end = uniform(tile.end);
    const int group = params.group;
    const float factor = tile.scale * kLog2E;
    ptx::mbarrier_wait(smem.key_full(), kv_parity);
    ptx::mbarrier_wait(smem.value_full(), kv_parity);
    kv_parity ^= 1;
    wait_dquery_buffer();  // then dV of the tile before has left the place of dS
    if constexpr (kT.masked) {
      const int keys = uniform(tile.clear_keys(p)), rows = uniform(tile.clear_rows(p));
      const int whole_begin = uniform(tile.whole_begin);
      // A query tile with rows to clear counts as cut.
      const int whole_end = min(uniform(tile.whole_end), rows < kQ ? end - 1 : end);
      const int all = consumer * 128 + thread;
      if (keys < kKeys) {
        clear_rows<kD / 64>(smem.key(), keys, kKeys, all, 256);
        clear_rows<kD / 64>(smem.value(), keys, kKeys, all, 256);
        ptx::fence_async_shared();
        ptx::barrier_sync(kBoth, 256);
      }
      // Cut tiles, whole ones, and cut ones again; each for all heads.
      const int direction = tile.direction(), steps = group * (end - begin);
      const int cut_before = direction > 0 ? whole_begin - begin : end - whole_end;
      const int first_whole = group * cut_before, whole = whole_end - whole_begin;
      const int end_whole = first_whole + group * whole;
      const int first_query = tile.first_query(params);
      int query_tile = first_query, left = group;
      const auto advance = [&] {
        if (--left == 0) {
          left = group;
          query_tile += direction;
        }
      };
      const auto cut_step = [&](auto first) {
        if (rows < kQ && query_tile == end - 1) {
          ptx::mbarrier_wait(smem.query_full(ring.stage), ring.parity);
          clear_rows<kD / 64>(smem.query(ring.stage), rows, kQ, all, 256);
          ptx::mbarrier_wait(smem.dout_full(ring.stage), ring.parity);
          clear_rows<kD / 64>(smem.dout(ring.stage), rows, kQ, all, 256);
          ptx::fence_async_shared();
          ptx::barrier_sync(kBoth, 256);
        }
        step(query_tile, Yes{}, first, tile, factor);
      };
      const auto pass_whole = [&](int& i) {
        query_tile = first_query + direction * (cut_before + whole);
        left = group;
#pragma unroll 1
        for (; i < end_whole; ++i) step(0, No{}, No{}, tile, factor);
      };
      if (steps > 0) {
        cut_step(Yes{});  // a mask that hides nothing does no harm
        advance();
        // Two forms of the same loop, for the sake of ptxas: with the other one it lacks registers
        // (C7511, or spills inside).
        if constexpr (kTogether) {
#pragma unroll 1
          for (int i = 1; i < steps;) {
            if (i < first_whole || i >= end_whole) {
              cut_step(No{});
              advance();
              ++i;
            } else {
              pass_whole(i);
            }
          }
        } else {
          int i = 1;
#pragma unroll 1
          for (int half = 0; half < 2; ++half) {
#pragma unroll 1
            for (const int until = half == 0 ? first_whole : steps; i < until; ++i) {
              cut_step(No{});
              advance();
            }
            if (half == 0 && i < end_whole) pass_whole(i);
          }
        }
        finish();
      } else {
#pragma unroll
        for (int i = 0; i < kD / 2; ++i) dkey[i] = dvalue[i] = 0.0f;
      }
    } else {
      step(0, No{}, Yes{}, tile, factor);
#pragma unroll 1
      for (int left = group * (end - begin); left > 1; --left) step(0, No{}, No{}, tile, factor);
      finish();
    }
    release(smem.key_empty());
    release(smem.value_empty());
    ptx::pin(dkey);
    ptx::pin(dvalue);

    // dV goes to this consumer's panels of dS once nobody reads dS any more, dK to the place of
    // its dQ; the storer sends them off.
    const float scale = tile.scale;
    ptx::mbarrier_arrive(smem.tile_empty(tile_ring.stage));
    ptx::barrier_sync(kBoth, 256);
    store_rows<kType, kD>(dvalue, smem.ds(0) + consumer * kQueryPanel, kT.ds_bytes(), warp, lane,
                          kProbabilityUnit);
    wait_dquery_buffer();
    dquery_parity ^= 1;
    store_rows<kType, kD>(dkey, smem.dquery(consumer), 64 * 128, warp, lane, scale);
    hand_over();
    tile_ring.next();
  }
}

}  // namespace flash2::sm90
