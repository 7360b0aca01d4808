// The backward's main kernel at head_dim 256: a cluster of two blocks shares a tile of 128 keys,
// 64 keys each, and one walk through Q and dO.
//
// Block r holds K and V of its keys and, for dQ, columns 128 r to 128 r + 127 of the other block's
// K. Its consumer 0 computes S^T = K Q^T, P^T and dV += P^T dO, its consumer 1 dP^T = V dO^T, dS^T
// and dK += dS^T Q, so no thread holds more than one of the two gradients. P^T goes from consumer
// 0 to 1 through the place where dS will lie, dS to the other block by a bulk copy between shared
// memories. Then each of the four consumers computes a quarter of dQ = dS K, 64 columns of it,
// over all 128 keys, and adds it to the sums from registers. Q and dO come from memory once per
// pair.
#pragma once

#include <cstdint>

#include "backward_rows.h"
#include "params.h"
#include "ptx/cluster.cuh"
#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/backward_kernels.h"
#include "sm90/backward_memory.cuh"
#include "sm90/backward_pair_parts.cuh"
#include "sm90/backward_scores.cuh"
#include "sm90/backward_tiles.h"
#include "sm90/backward_work.cuh"
#include "softmax.cuh"

namespace flash2::sm90 {

// Consumer 0: S^T, P^T, dV. The products of dV and dQ of a step run beside the scores of the next.
template <int kTile, DataType kType>
__device__ __forceinline__ void consume_probabilities(const PairConsumer<kTile, kType>& c,
                                                      float (&dvalue)[128], Ring<2>& ring) {
  using Consumer = PairConsumer<kTile, kType>;
  const auto& smem = c.smem;
  const BackwardProblem& p = c.params.problem;
  const float factor = c.tile.scale * kLog2E;
  const int first_key = c.tile.first_key() + c.rank * 64;
  const Interval whole = c.tile.whole(p, first_key, first_key + 63);
  const int whole_begin = uniform(whole.begin), whole_end = uniform(whole.end);
  const int clear = uniform(c.tile.clear_rows(p));
  const uint32_t p_to = transposed_row(smem.ds(0) + c.rank * Consumer::kPanel, c.warp(), c.lane());
  constexpr bool kCapped = Consumer::kT.capped;
  float s[32], dquery[32];
  uint32_t probabilities[4][4], kept[kCapped ? 4 : 1][4], sloped[kCapped ? 4 : 1][4];
  PairPlace before(c.params, c.walk);  // of the step before

  const auto is_cut = [&](int query_tile) {
    return Consumer::kT.masked && (query_tile < whole_begin || query_tile >= whole_end);
  };
  const auto find_visible_rows = [&](uint32_t (&visible)[2], int query_tile) {
    find_visible(visible, p, c.tile, first_key + c.warp() * 16 + c.lane() / 4,
                 query_tile * Consumer::kQ);
  };
  // Of the step before the one at ring.stage. What comes once a step has the parity of its stage.
  const auto start_dquery = [&] {
    ptx::mbarrier_wait(smem.ds_full(), ring.stage ^ 1);
    ptx::wgmma_fence();
    c.start_dquery(dquery);
  };
  const auto step = [&](auto is_first) {
    constexpr bool kFirst = decltype(is_first)::value;
    const uint32_t stage = ring.stage;
    const int query_tile = kFirst ? before.query_tile : before.next_query(c.walk);
    if constexpr (Consumer::kT.masked) {
      if (clear < Consumer::kQ && query_tile == c.tile.end - 1) c.clear_queries(ring, clear);
    }
    ptx::mbarrier_wait(smem.query_full(stage), ring.parity);
    uint32_t visible[2];
    if constexpr (kCapped) {  // here, and without a branch below: else C7512
      visible[0] = visible[1] = ~0u;
      if (is_cut(query_tile)) find_visible_rows(visible, query_tile);
    }
    float2 lse2[Consumer::kQ / 8];
    load_columns(lse2, smem.lse2(stage));  // behind products they would wait for these
    ptx::wgmma_fence();
    c.start_scores(s, smem.key(), smem.query(stage));
    if constexpr (!kFirst) {
      ptx::wgmma_wait<1>();  // dV of the step before
      c.release(smem.dout_empty(stage ^ 1));
      start_dquery();
    }
    ptx::wgmma_wait<kFirst ? 0 : 1>();
    ptx::pin(s);
    // After all exponentials, in name: the assembler would put them behind the wait for dQ.
    if constexpr (kCapped) {
      to_capped<kType>(s, lse2, SoftCap(p.soft_cap, c.tile.scale), kept, sloped);
      c.release(smem.query_empty(stage) + (bits_of(sloped) & c.params.zero));
    } else {
      to_probabilities(s, lse2, factor);
      if (is_cut(query_tile)) {
        find_visible_rows(visible, query_tile);
        mask_probabilities(s, visible);
      }
      ptx::pin(s);  // stay float32 until dQ is gone: 240 registers are few
      c.release(smem.query_empty(stage) + (bits_of(s) & c.params.zero));
    }
    if constexpr (!kFirst) {
      ptx::wgmma_wait<0>();
      ptx::pin(dquery);
      c.release(smem.ds_empty());
    }
    // Nobody reads dS any more, and the copy to the other block has left.
    ptx::mbarrier_wait(smem.ds_empty(), stage ^ 1);
    if constexpr (kCapped) mask_operand(sloped, visible);
    // float16 whatever the type: it fits the scaled P best. By an instruction of its own: words
    // that also were an operand of dV would be registers too many (C7512).
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (kCapped) {
        ptx::store_matrix_x4_transposed(p_to + k * 2048, sloped[k]);
      } else {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = ptx::pack_positive(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
        }
        ptx::store_matrix_x4_transposed(p_to + k * 2048, words);
      }
    }
    __syncwarp();
    if (c.lane() == 0) ptx::mbarrier_arrive(smem.p_full());
    if constexpr (!kFirst) {  // after P, for which the other consumer waits
      c.add_dquery(dquery, before, stage ^ 1);
      before.next(c.params, c.walk);
    }
    if constexpr (kCapped) {
      mask_operand(kept, visible);
#pragma unroll
      for (int i = 0; i < 16; ++i) probabilities[i / 4][i % 4] = ptx::opaque(kept[i / 4][i % 4]);
    } else {
      pack_all<kType>(s, probabilities);
    }
    ptx::mbarrier_wait(smem.dout_full(stage), ring.parity);
    ptx::wgmma_fence();
    c.start_gradient(dvalue, probabilities, smem.dout(stage));
    ring.next();
  };

  step(Yes{});
#pragma unroll 1
  for (int left = c.walk.steps - 1; left > 0; --left) step(No{});
  start_dquery();
  ptx::wgmma_wait<0>();
  ptx::pin(dquery);
  ptx::pin(dvalue);
  c.release(smem.dout_empty(ring.stage ^ 1));
  c.release(smem.ds_empty());
  c.add_dquery(dquery, before, ring.stage ^ 1);
}

// Consumer 1: dP^T, dS^T, dK. The products of dK and dQ of a step run beside the dP^T of the next.
template <int kTile, DataType kType>
__device__ __forceinline__ void consume_scores(const PairConsumer<kTile, kType>& c,
                                               float (&dkey)[128], Ring<2>& ring) {
  using Consumer = PairConsumer<kTile, kType>;
  const auto& smem = c.smem;
  const int clear = uniform(c.tile.clear_rows(c.params.problem));
  const uint32_t half = smem.ds(0) + c.rank * Consumer::kPanel;
  const uint32_t ds_to = transposed_row(half, c.warp(), c.lane());
  const uint32_t peer_half = ptx::peer_address(half, 1 - c.rank);
  const uint32_t peer_full = ptx::peer_address(smem.ds_full(), 1 - c.rank);
  float dp[32], dquery[32];
  uint32_t ds[4][4];
  PairPlace before(c.params, c.walk);  // of the step before

  // The first step computes a dQ from whatever lies in dS and drops it: without it, in a copy of
  // the step, ptxas finds too few registers and serialises every product (C7512).
  bool first = true;
#pragma unroll 1
  for (int left = c.walk.steps; left > 0; --left, first = false) {
    const uint32_t stage = ring.stage;
    if constexpr (Consumer::kT.masked) {
      if (clear < Consumer::kQ) {
        const int query_tile = first ? before.query_tile : before.next_query(c.walk);
        if (query_tile == c.tile.end - 1) c.clear_queries(ring, clear);
      }
    }
    ptx::mbarrier_wait(smem.dout_full(stage), ring.parity);
    ptx::wgmma_fence();
    c.start_scores(dp, smem.value(), smem.dout(stage));
    ptx::wgmma_wait<1>();  // dK of the step before
    if (!first) {
      c.release(smem.query_empty(stage ^ 1));
      ptx::mbarrier_wait(smem.ds_full(), stage ^ 1);
    }
    ptx::wgmma_fence();
    c.start_dquery(dquery);
    ptx::wgmma_wait<1>();
    ptx::pin(dp);
    ptx::wgmma_wait<0>();
    ptx::pin(dquery);
    if (!first) c.release(smem.ds_empty());
    // With masks, 1 % slower before the wait than after it.
    float2 delta[Consumer::kQ / 8];
    if constexpr (!Consumer::kT.masked) load_columns(delta, smem.delta(stage));
    ptx::mbarrier_wait(smem.p_full(), stage);
    if constexpr (Consumer::kT.masked) load_columns(delta, smem.delta(stage));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t words[4];
      ptx::load_matrix_x4_transposed(words, ds_to + k * 2048);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = 2 * k + e / 2, at_dp = 4 * j + e % 2 * 2;
        const float2 prob = ptx::unpack<DataType::kFloat16>(words[e]);
        ds[k][e] = ptx::pack<kType>(prob.x * fmaf(dp[at_dp], kProbabilityUnit, -delta[j].x),
                                    prob.y * fmaf(dp[at_dp + 1], kProbabilityUnit, -delta[j].y));
      }
    }
    c.release(smem.dout_empty(stage));
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // a warp overwrites exactly the P that it has read
      ptx::store_matrix_x4_transposed(ds_to + k * 2048, ds[k]);
    }
    ptx::fence_async_shared();
    ptx::barrier_sync(c.own(), 128);
    if (c.thread() == 0) {
      ptx::mbarrier_arrive_expect(smem.ds_full(), Consumer::kPanel);  // the other block's half
      ptx::bulk_copy_to_peer(peer_half, half, Consumer::kPanel, peer_full);
    }
    __syncwarp();
    ptx::wgmma_fence();
    c.start_gradient(dkey, ds, smem.query(stage));
    if (!first) {  // after dS, for which all others wait
      c.add_dquery(dquery, before, stage ^ 1);
      before.next(c.params, c.walk);
    }
    ring.next();
  }
  ptx::mbarrier_wait(smem.ds_full(), ring.stage ^ 1);
  ptx::wgmma_fence();
  c.start_dquery(dquery);
  ptx::wgmma_wait<0>();
  ptx::pin(dquery);
  ptx::pin(dkey);
  c.release(smem.query_empty(ring.stage ^ 1));
  c.release(smem.ds_empty());
  c.add_dquery(dquery, before, ring.stage ^ 1);
}

// All tiles of a consumer.
template <int kTile, DataType kType, int kConsumer>
__device__ __forceinline__ void consume_tiles(
    const BackwardMaps& maps, const BackwardParams& params, const BackwardMemory<kTile>& smem,
    const typename PairConsumer<kTile, kType>::Tile* tiles, int rank) {
  using Consumer = PairConsumer<kTile, kType>;
  constexpr BackwardTile kT = Consumer::kT;
  const CUtensorMap* map = kConsumer == 0 ? &maps.dvalue : &maps.dkey;
  Ring<2> ring, tile_ring;
#pragma unroll 1
  for (;;) {
    ptx::mbarrier_wait(smem.tile_full(tile_ring.stage), tile_ring.parity);
    const auto& tile = tiles[tile_ring.stage];
    if (uniform(tile.block) < 0) break;
    const PairWalk walk(params, tile);
    const Consumer c{params, smem, tile, walk, rank, kConsumer};
    float gradient[128];  // dV or dK
#pragma unroll
    for (int i = 0; i < 128; ++i) gradient[i] = 0.0f;
    ptx::mbarrier_wait(smem.key_full(), tile_ring.stage);
    ptx::mbarrier_wait(smem.value_full(), tile_ring.stage);
    if (walk.steps > 0) {
      if constexpr (kT.masked) c.clear_keys();
      if constexpr (kConsumer == 0) {
        consume_probabilities(c, gradient, ring);
      } else {
        consume_scores(c, gradient, ring);
      }
    }
    // dV goes over V and dK over K, once both consumers are past their last read of them.
    ptx::barrier_sync_unaligned(c.kBoth, 256);
    const uint32_t place = kConsumer == 0 ? smem.value() : smem.key();
    store_rows<kType, kT.head_dim>(gradient, place, Consumer::Memory::kKeyPanel, c.warp(),
                                   c.lane(), kConsumer == 0 ? kProbabilityUnit : tile.scale);
    ptx::fence_async_shared();
    ptx::barrier_sync(c.own(), 128);
    if (c.thread() == 0) {
      for (int panel = 0; panel < kT.panels(); ++panel) {
        ptx::tma_store(map, place + panel * Consumer::Memory::kKeyPanel, panel * 64,
                       tile.first_key() + rank * kT.keys(), tile.head_kv, tile.batch);
      }
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
      ptx::mbarrier_arrive(kConsumer == 0 ? smem.value_empty() : smem.key_empty());
    }
    __syncwarp();
    ptx::mbarrier_arrive(smem.tile_empty(tile_ring.stage));
    tile_ring.next();
  }
}

template <int kTile, DataType kType>
__global__ void __launch_bounds__(kBackwardTiles[kTile].threads(), 1)
    backward_pair(const __grid_constant__ BackwardMaps maps,
                  const __grid_constant__ BackwardParams params) {
  constexpr BackwardTile kT = kBackwardTiles[kTile];
  using Memory = BackwardMemory<kTile>;
  using Tile = KeyTile<kTile>;
  extern __shared__ __align__(1024) char shared_memory[];
  const Memory smem{ptx::shared_address(shared_memory)};
  const int group = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x / 32 % 4);
  const int lane = threadIdx.x % 32, rank = uniform(ptx::cluster_rank());

  Tile* tiles = reinterpret_cast<Tile*>(shared_memory + Memory::tile_offset(0));
  if (threadIdx.x == 0) smem.init_barriers();
  __syncwarp();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  ptx::launch_dependents();

  if (group == 0) {
    ptx::lower_registers<24>();
    if (warp == 0) {
      PairProducer<kTile>{maps, params, smem, tiles, rank, lane == 0}.run();
    } else if (kT.turns && warp < 3) {
      PairTurns<kTile>{params, smem, tiles, rank, warp - 1, lane == 0}.run();
    }
  } else {
    ptx::raise_registers<240>();
    // A loop of its own for each: what one keeps in registers over its tiles the other has none
    // for.
    if (group == 1) {
      consume_tiles<kTile, kType, 0>(maps, params, smem, tiles, rank);
    } else {
      consume_tiles<kTile, kType, 1>(maps, params, smem, tiles, rank);
    }
  }
  // No block may leave while its peer can still write to it or arrive on its barriers.
  __syncwarp();
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace flash2::sm90
