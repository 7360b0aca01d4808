// The producer of a forward block: one warp that starts all copies.
#pragma once

#include <cstdint>

#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "sm90/kernels.h"
#include "sm90/shared_memory.cuh"
#include "sm90/work.cuh"

namespace flash2::sm90 {

// In the order in which the consumers need things: K runs one block ahead of V, also from one tile
// to the next, so the next tile's Q and first K come before this one's last V is used.
template <int kTile>
struct Producer {
  static constexpr ForwardTile kT = kForwardTiles[kTile];
  static constexpr int kPanels = kT.head_dim / 64;
  // Whether the next tile's Q has room before the consumers are done with this tile's.
  static constexpr bool kEarlyQ = kT.q_stages == 2 || kT.pairs;

  const ForwardMaps& maps;
  const ForwardParams& params;
  const ForwardSchedule& schedule;
  SharedMemory<kTile> smem;
  bool leader;
  // Policies of the L2 cache: K and V are read again, but for those that a cluster shares out, Q
  // is not.
  uint64_t keep, pass;
  Ring<kT.stages()> k_ring, v_ring;
  Ring<2> tile_ring;
  Ring<kT.q_stages> q_ring;

  __device__ __forceinline__ void run() {
    pass = ptx::policy_evict_first();
    keep = kT.joins ? pass : ptx::policy_evict_last();
    Work work = take_tile();
    load_k(work, 0);
    load_q(work);
    for (;;) {
      if (work.steps <= kLead) want_next();
#pragma unroll 1
      for (int step = 1; step < work.steps; ++step) {
        if (step == work.steps - kLead) want_next();
        load_k(work, step);
        load_v(work, step - 1);
      }
      const Work next = take_tile();
      if (!next.exists) break;
      if (kEarlyQ) load_q(next);
      load_k(next, 0);
      load_v(work, work.steps - 1);
      if (!kEarlyQ) load_q(next);  // waits until the consumers are done with this tile's
      work = next;
    }
    load_v(work, work.steps - 1);
  }

 private:
  // The next tile is asked for so many steps before the end of this one: later, and the consumers
  // would wait for it; earlier, and it would be bound to this block however long the present one
  // takes, which undoes the order by length.
  static constexpr int kLead = 2;

  __device__ __forceinline__ void want_next() {
    if (leader) ptx::mbarrier_arrive(smem.tile_wanted());
  }

  __device__ __forceinline__ Work take_tile() {
    ptx::mbarrier_wait_warp(smem.tile_full(tile_ring.stage), tile_ring.parity);
    const Work work = Work::load(smem.tile(tile_ring.stage));
    ptx::mbarrier_arrive(smem.tile_empty(tile_ring.stage));
    tile_ring.next();
    return work;
  }

  __device__ __forceinline__ void load_q(const Work& work) {
    const int batch = params.problem.query_stride.batch == 0 ? 0 : work.batch;
    const int head = work.head - work.head_kv * schedule.group;
    const int rows = 64 >> (kT.packs() ? schedule.pack_shift : 0);  // of each head
    for (int c = 0; c < kT.consumers; ++c) {
      const uint32_t full = smem.q_full(q_ring.stage, c);
      ptx::mbarrier_wait_warp(smem.q_empty(q_ring.stage, c), q_ring.parity ^ 1);
      if (leader) {
        ptx::mbarrier_arrive_expect(full, kT.q_bytes());
        for (int panel = 0; panel < kPanels; ++panel) {
          ptx::tma_load_pack(smem.q(q_ring.stage, c) + panel * 64 * 128, &maps.query, full,
                             panel * 64, head, work.row0 + rows * c, work.head_kv, batch, pass);
        }
      }
    }
    q_ring.next();
  }

  __device__ __forceinline__ void load_k(const Work& work, int step) {
    load_kv(maps.key, smem.k(k_ring.stage), smem.k_full(k_ring.stage), smem.k_empty(k_ring.stage),
            k_ring.parity, work, step, params.problem.key_stride.batch);
    k_ring.next();
  }

  __device__ __forceinline__ void load_v(const Work& work, int step) {
    load_kv(maps.value, smem.v(v_ring.stage), smem.v_full(v_ring.stage),
            smem.v_empty(v_ring.stage), v_ring.parity, work, step,
            params.problem.value_stride.batch);
    v_ring.next();
  }

  __device__ __forceinline__ void load_kv(const CUtensorMap& map, uint32_t target, uint32_t full,
                                          uint32_t empty, uint32_t parity, const Work& work,
                                          int step, int64_t batch_stride) {
    const int batch = batch_stride == 0 ? 0 : work.batch;
    ptx::mbarrier_wait_warp(empty, parity ^ 1);
    if (leader) {
      ptx::mbarrier_arrive_expect(full, kT.kv_bytes());
      const int key = work.first_key<kT.tile_kv>(step);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const uint32_t rows = target + panel * kT.tile_kv * 128;
        if constexpr (kT.pairs) {
          const int first = static_cast<int>(ptx::cluster_rank()) * kT.box_kv();
          ptx::tma_load_multicast(rows + 128 * first, &map, full, panel * 64, key + first,
                                  work.head_kv, batch, 3, keep);
        } else {
          ptx::tma_load(rows, &map, full, panel * 64, key, work.head_kv, batch, keep);
        }
      }
    }
  }
};

}  // namespace flash2::sm90
