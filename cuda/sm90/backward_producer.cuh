// What the first warpgroup of a backward block does: one warp starts all loads, two more store
// what the consumers hand them.
#pragma once

#include <cstdint>

#include "params.h"
#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/backward_kernels.h"
#include "sm90/backward_memory.cuh"
#include "sm90/backward_work.cuh"

namespace flash2::sm90 {

// A whole warp; its first lane starts the copies.
template <int kTile>
struct BackwardProducer {
  static constexpr BackwardTile kT = kBackwardTiles[kTile];
  using Memory = BackwardMemory<kTile>;
  using Tile = KeyTile<kTile>;

  const BackwardMaps& maps;
  const BackwardParams& params;
  Memory smem;
  Tile* tiles;  // two, in shared memory
  bool leader;
  uint64_t keep, pass;  // policies of the L2 cache: Q and dO are read again, K and V are not
  Ring<2> query_ring, dout_ring;

  __device__ __forceinline__ void run() {
    const BackwardProblem& p = params.problem;
    keep = ptx::policy_evict_last();
    pass = ptx::policy_evict_first();
    const uint32_t count = tiles_to_take<kTile>(params);
    const int group = params.group;
    Ring<2> ring;
    uint32_t parity = 1;  // of `empty` of K and V
    bool fresh = true;
    for (uint32_t number = blockIdx.x;;) {
      const Tile& tile = hand_over(params, number, count, smem, tiles, ring, leader);
      if (number >= count) break;

      // In the order in which the buffers become free: K is read last, by the tile's last dQ.
      if (fresh) {
        load_kv(maps.key, smem.key(), smem.key_full(), smem.key_empty(), parity, tile,
                p.key_stride);
        ptx::wait_prerequisites();
      }
      const int steps = tile.steps() * group;
      const int first_head = tile.head_kv * group + tile.first_of_group(params);
      int head = first_head, query_tile = tile.first_query(params);
#pragma unroll 1
      for (int step = 0; step == 0 || step < steps; ++step) {
        if (step < steps)
          load_rows(query_ring, maps.query, smem.query(query_ring.stage),
                    smem.query_full(query_ring.stage), smem.query_empty(query_ring.stage),
                    maps.lse2, smem.lse2(query_ring.stage), tile, head, query_tile,
                    p.query_stride);
        if (step == 0) {
          load_kv(maps.value, smem.value(), smem.value_full(), smem.value_empty(), parity, tile,
                  p.value_stride);
        }
        if (step < steps)
          load_rows(dout_ring, maps.dout, smem.dout(dout_ring.stage),
                    smem.dout_full(dout_ring.stage), smem.dout_empty(dout_ring.stage), maps.delta,
                    smem.delta(dout_ring.stage), tile, head, query_tile, p.dout_stride);
        if (step == 0 && !fresh) {
          load_kv(maps.key, smem.key(), smem.key_full(), smem.key_empty(), parity, tile,
                  p.key_stride);
        }
        if (++head == (tile.head_kv + 1) * group) head -= group;
        if (head == first_head) query_tile = tile.next_query(query_tile);
      }
      fresh = false;
      parity ^= 1;
      // Taken as late as possible: a tile taken earlier is bound to this block however long the
      // present one takes, which undoes the order by length.
      if (leader) number = gridDim.x + atomicAdd(params.ticket, 1);
      number = __shfl_sync(~0u, number, 0);
    }
  }

 private:
  __device__ __forceinline__ void load_kv(const CUtensorMap& map, uint32_t target, uint32_t full,
                                          uint32_t empty, uint32_t parity, const Tile& tile,
                                          const Strides& stride) {
    ptx::mbarrier_wait_warp(empty, parity);
    if (!leader) return;
    const int batch = stride.batch == 0 ? 0 : tile.batch;
    ptx::mbarrier_arrive_expect(full, kT.kv_bytes());
    for (int panel = 0; panel < kT.panels(); ++panel) {
      ptx::tma_load(target + panel * Memory::kKeyPanel, &map, full, panel * 64, tile.first_key(),
                    tile.head_kv, batch, pass);
    }
  }

  // A step's rows of Q or dO, and what each row has beside them.
  __device__ __forceinline__ void load_rows(Ring<2>& ring, const CUtensorMap& map, uint32_t target,
                                            uint32_t full, uint32_t empty,
                                            const CUtensorMap& per_row, uint32_t per_row_target,
                                            const Tile& tile, int head, int query_tile,
                                            const Strides& stride) {
    ptx::mbarrier_wait_warp(empty, ring.parity ^ 1);
    ring.next();
    if (!leader) return;
    const int batch = stride.batch == 0 ? 0 : tile.batch;
    const int row = query_tile * kT.tile_q;
    ptx::mbarrier_arrive_expect(full, kT.stage_bytes() + 4 * kT.tile_q);
    for (int panel = 0; panel < kT.panels(); ++panel) {
      ptx::tma_load(target + panel * Memory::kQueryPanel, &map, full, panel * 64, row, head, batch,
                    keep);
    }
    ptx::tma_load_rows(per_row_target, &per_row, full, row,
                       tile.batch * params.problem.heads_q + head);
  }
};

// One thread each: they add the dQ of a step to the sums, and store the dK and dV of a tile after
// its last step. Each serves one consumer.
//
// Where walks are long all add to zeros written before, and wait for nobody. Where they are short
// the first key block that visits a query tile stores its dQ, so that nobody need write zeros; the
// others wait for its flag and add. The first is the one with the smallest number or, where walks
// go around, whoever has data first. If the sums must come out the same on every run, each waits
// for all before it instead. That round, from a look at the flag to its next value, takes longer
// than a step: where there is a kernel for it, each storer serves both consumers, at every second
// step.
template <int kTile>
struct BackwardStorer {
  static constexpr BackwardTile kT = kBackwardTiles[kTile];
  // The consumers share a step's dQ by rows or by columns.
  static constexpr bool kByRows = kT.tile_q == 128;
  static constexpr bool kInTurns = kT.deterministic;
  using Memory = BackwardMemory<kTile>;
  using Tile = KeyTile<kTile>;

  const BackwardParams& params;
  Memory smem;
  const Tile* tiles;
  int which;
  uint32_t step = 0;  // the gradients of a tile count as one

  __device__ __forceinline__ void run(const BackwardMaps& maps) {
    const BackwardProblem& p = params.problem;
    const int group = params.group;
    Ring<2> ring;
    ptx::wait_prerequisites();  // before the first look at a flag
    for (;;) {
      ptx::mbarrier_wait(smem.tile_full(ring.stage), ring.parity);
      const Tile& tile = tiles[ring.stage];
      if (tile.block < 0) break;
      const int first_head = tile.first_of_group(params);
      int query_tile = tile.first_query(params), head = first_head;
#pragma unroll 1
      for (int n = group * tile.steps(); n > 0; --n, ++step) {
        if (mine()) add(tile, query_tile, head + tile.head_kv * group);
        if (++head == group) head = 0;
        if (head == first_head) query_tile = tile.next_query(query_tile);
      }
      if (mine()) store(maps, tile);
      const int key_head = tile.batch * p.heads_kv + tile.head_kv;
      ptx::mbarrier_arrive(smem.tile_empty(ring.stage));
      ring.next();
      if (mine()) {
        ptx::bulk_wait_read<0>();
        for (int consumer = first(); consumer < end(); ++consumer) {
          ptx::mbarrier_arrive(smem.dquery_empty(consumer));
        }
      }
      ++step;
      if (kT.finishes() && params.finish_inside) {
        ptx::bulk_wait<0>();
        ptx::fence_async_global();
        ptx::add_release(params.finished + key_head, 1);
      }
    }
    ptx::bulk_wait<0>();
  }

 private:
  // The steps and the consumers, [first, end), that this storer serves.
  __device__ __forceinline__ bool mine() const { return !kInTurns || (step ^ which) % 2 == 0; }
  __device__ __forceinline__ int first() const { return kInTurns ? 0 : which; }
  __device__ __forceinline__ int end() const { return kInTurns ? 2 : which + 1; }
  __device__ __forceinline__ void wait_full(int consumer) const {
    if constexpr (kInTurns) {
      ptx::mbarrier_wait(smem.dquery_full(consumer, step % 2), step / 2 % 2);
    } else {
      ptx::mbarrier_wait(smem.dquery_full(consumer), step % 2);
    }
    ptx::fence_async_shared();  // not by the consumer, whom its stores would keep waiting
  }

  // The dQ of a step.
  __device__ __forceinline__ void add(const Tile& tile, int query_tile, int head) const {
    const BackwardProblem& p = params.problem;
    const int64_t row =
        (int64_t{tile.batch} * p.heads_q + head) * params.rows_per_head + query_tile * kT.tile_q;
    int32_t* flag = params.turns + row / 16 + first();
    bool stores = false;
    if constexpr (kT.around) {
      stores = comes_first(flag);
    } else if (params.first_stores) {
      const int before = kT.masked ? tile.visitors_before(p, query_tile) : tile.block;
      stores = before == 0;
      if (!stores) {  // asked for ahead of the data: mostly true long before
        const int turn = p.deterministic ? before : 1;
        while (ptx::load_acquire(flag) < turn) {
        }
        ptx::fence_async_global();
      }
    }
    float* sums = params.dquery_sums + row * p.head_dim;
#pragma unroll 1
    for (int consumer = first(); consumer < end(); ++consumer) {
      wait_full(consumer);
      const uint32_t from = smem.dquery(consumer);
      if (kT.transposed()) {
        add(sums + 64 * kT.tile_q * consumer, from, kT.stage_bytes(), stores);
      } else {
        // Strips of 16 rows, one of each warp of the consumer: 8 blocks of 8 columns, or fewer.
        const int column = kByRows ? 0 : 8 * consumer;
        const int blocks = min(8, p.head_dim / 8 - column);
        float* to = sums + (kByRows ? 64 * consumer * p.head_dim : 0) + column * 128;
        for (int strip = 0; blocks > 0 && strip < 4; ++strip) {
          add(to + 16 * strip * p.head_dim, from + strip * 4096, blocks * 512, stores);
        }
      }
      ptx::bulk_commit();
    }
    if constexpr (kInTurns) {
      ptx::bulk_wait_read<1>();
      ptx::mbarrier_arrive(smem.dquery_empty(0));
    }
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(smem.dquery_empty(end() - 1));
    if (stores || p.deterministic) {
      ptx::bulk_wait<0>();
      ptx::fence_async_global();
      ptx::add_release(flag, 1);  // from claimed to stored, too
    }
  }

  // Where any may be the first at a query tile, whether this is it; if not, waits until that has
  // stored. Its flag tells.
  __device__ __forceinline__ bool comes_first(int32_t* flag) const {
    constexpr int kNobody = 0, kClaimed = 1, kStored = 2;
    if (ptx::load_acquire(flag) < kStored) {
      wait_full(first());  // nobody shall wait for one that has nothing to store yet
      if (atomicCAS(flag, kNobody, kClaimed) == kNobody) return true;
      while (ptx::load_acquire(flag) < kStored) {
      }
    }
    ptx::fence_async_global();
    return false;
  }

  static __device__ __forceinline__ void add(float* to, uint32_t from, uint32_t bytes,
                                             bool first) {
    if (first) {
      ptx::bulk_store(to, from, bytes);
    } else {
      ptx::bulk_add(to, from, bytes);
    }
  }

  // dK and dV of a tile.
  __device__ __forceinline__ void store(const BackwardMaps& maps, const Tile& tile) const {
#pragma unroll 1
    for (int consumer = first(); consumer < end(); ++consumer) {
      wait_full(consumer);
      const int row = tile.first_key() + 64 * consumer;
      for (int panel = 0; panel < kT.panels(); ++panel) {
        ptx::tma_store(&maps.dvalue, smem.ds(panel) + consumer * Memory::kQueryPanel, panel * 64,
                       row, tile.head_kv, tile.batch);
        ptx::tma_store(&maps.dkey, smem.dquery(consumer) + panel * 64 * Memory::kRow, panel * 64,
                       row, tile.head_kv, tile.batch);
      }
    }
    ptx::bulk_commit();
  }
};

}  // namespace flash2::sm90
