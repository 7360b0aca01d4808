// The parts of backward_pair.cuh that its two consumers share, and its producer.
#pragma once

#include <cstdint>

#include "params.h"
#include "plan.h"
#include "ptx/cluster.cuh"
#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/backward_kernels.h"
#include "sm90/backward_memory.cuh"
#include "sm90/backward_scores.cuh"
#include "sm90/backward_tiles.h"
#include "sm90/backward_work.cuh"

namespace flash2::sm90 {

// A tile's walk, in uniform registers; taken by whole warps.
struct PairWalk {
  int steps;
  int first_query;
  int direction;
  int head_end;  // of the group, counted through all batch entries

  template <class Tile>
  __device__ __forceinline__ PairWalk(const BackwardParams& params, const Tile& tile)
      : steps(uniform(tile.steps()) * params.group),
        first_query(uniform(tile.first_query(params))),
        direction(uniform(tile.direction())),
        head_end(uniform(tile.batch) * params.problem.heads_q +
                 (uniform(tile.head_kv) + 1) * params.group) {}
};

// A place in it: each query tile for all heads of the group.
struct PairPlace {
  int query_tile;
  int left;  // heads, this one counted

  __device__ __forceinline__ PairPlace(const BackwardParams& params, const PairWalk& walk)
      : query_tile(walk.first_query), left(params.group) {}

  // The query tile's place in the workspace, in blocks of kRowPadding rows.
  __device__ __forceinline__ int block(const BackwardParams& params, const PairWalk& walk) const {
    return (walk.head_end - left) * static_cast<int>(params.row_blocks.value) + query_tile;
  }
  __device__ __forceinline__ int next_query(const PairWalk& walk) const {
    return left == 1 ? query_tile + walk.direction : query_tile;
  }
  // Without a branch: it stands between products.
  __device__ __forceinline__ void next(const BackwardParams& params, const PairWalk& walk) {
    query_tile = next_query(walk);
    left = left == 1 ? params.group : left - 1;
  }
};

// A whole warp of each block. It takes the tiles; its first lane starts the copies, of Q and dO
// panels 2 rank and 2 rank + 1, which go to both blocks.
template <int kTile>
struct PairProducer {
  static constexpr BackwardTile kT = kBackwardTiles[kTile];
  using Memory = BackwardMemory<kTile>;
  using Tile = KeyTile<kTile>;

  const BackwardMaps& maps;
  const BackwardParams& params;
  Memory smem;
  Tile* tiles;  // two, in shared memory
  int rank;
  bool leader;
  uint64_t keep, pass;  // policies of the L2 cache: Q and dO are read again, K and V are not
  Ring<2> ring;         // of Q and dO
  uint32_t parity = 1;  // of `empty` of K and V

  __device__ __forceinline__ void run() {
    keep = ptx::policy_evict_last();
    pass = ptx::policy_evict_first();
    const uint32_t count = tiles_to_take<kTile>(params);
    Ring<2> tile_ring;
    ptx::wait_prerequisites();
#pragma unroll 1
    for (uint32_t parity_of_number = 0;; parity_of_number ^= 1) {
      // As late as possible, as with single blocks. Who waits for sums must be sure that those
      // before are at work: the first tiles too are taken in the order in which pairs begin.
      const uint32_t number = take(parity_of_number);
      const Tile& tile = hand_over(params, number, count, smem, tiles, tile_ring, leader);
      if (number >= count) break;
      if (leader) load(tile);
      __syncwarp();
    }
  }

 private:
  // The next number, which block 0 asks for.
  __device__ __forceinline__ uint32_t take(uint32_t number_parity) const {
    uint32_t number = 0;
    if (leader) {
      if (rank == 0) {
        ptx::mbarrier_wait(smem.number_empty(), number_parity ^ 1);
        number = atomicAdd(params.ticket, 1);
        for (int r = 0; r < 2; ++r) {
          ptx::store_peer_async(ptx::peer_address(smem.number(), r), number,
                                ptx::peer_address(smem.number_full(), r));
        }
      }
      ptx::mbarrier_arrive_expect(smem.number_full(), 4);
      ptx::mbarrier_wait(smem.number_full(), number_parity);
      number = ptx::load_shared(smem.number());
      if (rank == 1) ptx::mbarrier_arrive_peer(ptx::peer_address(smem.number_empty(), 0));
    }
    return uniform(number);
  }

  // What a tile needs, by one thread. K and V become free last.
  __device__ __forceinline__ void load(const Tile& tile) {
    const BackwardProblem& p = params.problem;
    const int steps = tile.steps() * params.group;
    int head = tile.head_kv * params.group, query_tile = tile.first_query(params);
#pragma unroll 1
    for (int step = 0; step == 0 || step < steps; ++step) {
      if (step < steps) {
        load_rows(tile, maps.query, smem.query(ring.stage), smem.query_full(ring.stage),
                  smem.query_empty(ring.stage), smem.lse2(ring.stage), maps.lse2, head, query_tile,
                  p.query_stride);
        load_rows(tile, maps.dout, smem.dout(ring.stage), smem.dout_full(ring.stage),
                  smem.dout_empty(ring.stage), smem.delta(ring.stage), maps.delta, head,
                  query_tile, p.dout_stride);
        ring.next();
      }
      if (step == 0) {
        load_key(tile);
        load_value(tile);
      }
      if (++head == (tile.head_kv + 1) * params.group) {
        head -= params.group;
        query_tile += tile.direction();
      }
    }
    parity ^= 1;
  }
  __device__ __forceinline__ void load_key(const Tile& tile) const {
    const Problem& p = params.problem;
    const int key = tile.first_key() + rank * kT.keys();
    const int other_key = tile.first_key() + (1 - rank) * kT.keys();
    const int batch = p.key_stride.batch == 0 ? 0 : tile.batch;
    ptx::mbarrier_wait(smem.key_empty(), parity);
    ptx::mbarrier_arrive_expect(smem.key_full(), kT.kv_bytes() + kT.kv_bytes() / 2);
    for (int panel = 0; panel < kT.panels(); ++panel) {
      ptx::tma_load(smem.key() + panel * Memory::kKeyPanel, &maps.key, smem.key_full(), panel * 64,
                    key, tile.head_kv, batch, pass);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::tma_load(smem.other_key() + i * Memory::kKeyPanel, &maps.key, smem.key_full(),
                    (2 * rank + i) * 64, other_key, tile.head_kv, batch, pass);
    }
  }
  __device__ __forceinline__ void load_value(const Tile& tile) const {
    const Problem& p = params.problem;
    const int batch = p.value_stride.batch == 0 ? 0 : tile.batch;
    ptx::mbarrier_wait(smem.value_empty(), parity);
    ptx::mbarrier_arrive_expect(smem.value_full(), kT.kv_bytes());
    for (int panel = 0; panel < kT.panels(); ++panel) {
      ptx::tma_load(smem.value() + panel * Memory::kKeyPanel, &maps.value, smem.value_full(),
                    panel * 64, tile.first_key() + rank * kT.keys(), tile.head_kv, batch, pass);
    }
  }
  // A step's rows of Q or dO, and what each row has beside them.
  __device__ __forceinline__ void load_rows(const Tile& tile, const CUtensorMap& map,
                                            uint32_t target, uint32_t full, uint32_t empty,
                                            uint32_t per_row_target, const CUtensorMap& per_row,
                                            int head, int query_tile,
                                            const Strides& stride) const {
    constexpr uint16_t kBoth = 3;
    const int batch = stride.batch == 0 ? 0 : tile.batch;
    ptx::mbarrier_wait(empty, ring.parity ^ 1);
    ptx::mbarrier_arrive_expect(full, kT.stage_bytes() + 4 * kT.tile_q);  // the other half too
    for (int i = 0; i < 2; ++i) {
      const int panel = 2 * rank + i;
      ptx::tma_load_multicast(target + panel * Memory::kQueryPanel, &map, full, panel * 64,
                              query_tile * kT.tile_q, head, batch, kBoth, keep);
    }
    ptx::tma_load_rows(per_row_target, &per_row, full, query_tile * kT.tile_q,
                       tile.batch * params.problem.heads_q + head);
  }
};

// Looks ahead for a consumer to whether it may add to a query tile's sums, or is the first there
// and stores, and tells others when it has: neither is on the consumer's way. Where sums must come
// out the same on every run, each waits for all before it, else for the first alone.
// A whole warp; its first lane waits and tells.
template <int kTile>
struct PairTurns {
  static constexpr BackwardTile kT = kBackwardTiles[kTile];
  using Tile = KeyTile<kTile>;

  const BackwardParams& params;
  BackwardMemory<kTile> smem;
  const Tile* tiles;
  int rank, consumer;
  bool leader;

  __device__ __forceinline__ void run() const {
    Ring<2> ring;
    uint32_t parity = 0;
    ptx::wait_prerequisites();
    for (;;) {
      ptx::mbarrier_wait_warp(smem.tile_full(ring.stage), ring.parity);
      const Tile& tile = tiles[ring.stage];
      if (uniform(tile.block) < 0) break;
      const PairWalk walk(params, tile);
      if (leader) {
        PairPlace at(params, walk);
#pragma unroll 1
        for (int left = walk.steps; left > 0; --left, parity ^= 1) {
          pass_on(tile, at.query_tile, at.block(params, walk), parity);
          at.next(params, walk);
        }
      }
      __syncwarp();
      ptx::mbarrier_arrive(smem.tile_empty(ring.stage));
      ring.next();
    }
  }

 private:
  __device__ __forceinline__ void pass_on(const Tile& tile, int query_tile, int block,
                                          uint32_t parity) const {
    int32_t* turn = params.turns + int64_t{block} * (kRowPadding / 16) + 2 * rank + consumer;
    const bool all = params.problem.deterministic;
    const int before = tile.visitors_before(params.problem, query_tile);
    while (ptx::load_acquire(turn) < (all ? before : min(before, 1))) {
    }
    ptx::store_shared(smem.is_first(consumer), before == 0 && params.first_stores);
    ptx::mbarrier_arrive(smem.dquery_empty(consumer));
    ptx::mbarrier_wait(smem.dquery_full(consumer), parity);
    if (all || before == 0) ptx::add_release(turn, 1);
  }
};

// What both consumers of a block do, and what they need for it.
template <int kTile, DataType kType>
struct PairConsumer {
  static constexpr BackwardTile kT = kBackwardTiles[kTile];
  static constexpr int kD = kT.head_dim, kQ = kT.tile_q, kPanel = 64 * 128;
  // Named barriers: of both consumers, whose code differs, and of each.
  static constexpr int kBoth = 1;
  using Memory = BackwardMemory<kTile>;
  using Tile = KeyTile<kTile>;

  const BackwardParams& params;
  Memory smem;
  const Tile& tile;
  const PairWalk& walk;
  int rank, consumer;

  // Made anew from the thread's number wherever they are needed: registers are few.
  __device__ __forceinline__ int thread() const { return threadIdx.x % 128; }
  __device__ __forceinline__ int warp() const { return thread() / 32; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int own() const { return 2 + consumer; }
  __device__ __forceinline__ int quarter() const { return 2 * rank + consumer; }
  // A stage is free once all of both blocks are done: TMA writes to both.
  __device__ __forceinline__ void release(uint32_t barrier) const {
    if (lane() < 2) ptx::mbarrier_arrive_peer(ptx::peer_address(barrier, lane()));
  }
  // x = A B^T over head_dim: S^T or dP^T.
  __device__ __forceinline__ void start_scores(float (&x)[kQ / 2], uint32_t a, uint32_t b) const {
    // Made anew in each step: kept, the descriptors of all 16 would fill the uniform registers.
    const uint64_t from_a = ptx::wgmma_descriptor(ptx::opaque(a));
    const uint64_t from_b = ptx::wgmma_descriptor(b);
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      const int at = k / 4 * kPanel + k % 4 * 32;
      ptx::wgmma<kType, false, false>(x, ptx::wgmma_advance(from_a, at),
                                      ptx::wgmma_advance(from_b, at), k != 0);
    }
    ptx::wgmma_commit();
  }
  // sum += A B over the queries: dV or dK.
  __device__ __forceinline__ void start_gradient(float (&sum)[kD / 2],
                                                 const uint32_t (&a)[kQ / 16][4],
                                                 uint32_t b) const {
    const uint64_t from = ptx::wgmma_descriptor(b, kPanel);
#pragma unroll
    for (int k = 0; k < kQ / 16; ++k) {
      ptx::wgmma<kType, true>(sum, a[k], ptx::wgmma_advance(from, k * 2048), true);
    }
    ptx::wgmma_commit();
  }
  // This consumer's quarter of dQ, 64 columns, over the keys of block 0, then of block 1.
  __device__ __forceinline__ void start_dquery(float (&dquery)[32]) const {
    const uint64_t ds = ptx::wgmma_descriptor(smem.ds(0));
    const uint64_t mine = ptx::wgmma_descriptor(smem.key() + quarter() * kPanel);
    const uint64_t other = ptx::wgmma_descriptor(smem.other_key() + consumer * kPanel);
    const uint64_t first = rank == 0 ? mine : other, second = rank == 0 ? other : mine;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      ptx::wgmma<kType, false, true>(dquery, ptx::wgmma_advance(ds, k / 4 * kPanel + k % 4 * 32),
                                     ptx::wgmma_advance(k < 4 ? first : second, k % 4 * 2048),
                                     k != 0);
    }
    ptx::wgmma_commit();
  }
  // Adds it to the sums. `parity`: of the step.
  __device__ __forceinline__ void add_dquery(const float (&dquery)[32], const PairPlace& at,
                                             uint32_t parity) const {
    const BackwardProblem& p = params.problem;
    const int blocks = p.head_dim / 8 - 8 * quarter();  // of 8 columns, that exist
    float* to = params.dquery_sums + 16 * warp() * p.head_dim + quarter() * 1024 + lane() * 4 +
                int64_t{at.block(params, walk)} * (kRowPadding * p.head_dim);
    bool first = false;
    if constexpr (kT.turns) {
      ptx::mbarrier_wait(smem.dquery_empty(consumer), parity);
      // Read by the lane that arrives below.
      first = uniform(lane() == 0 ? ptx::load_shared(smem.is_first(consumer)) : 0u) != 0;
    }
    const auto each = [&](auto&& write) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float block[4] = {dquery[4 * i], dquery[4 * i + 1], dquery[4 * i + 2],
                                dquery[4 * i + 3]};
        if (i < blocks) write(to + i * 128, block);
      }
    };
    if (first) {
      each([](float* address, const float (&v)[4]) {
        *reinterpret_cast<float4*>(address) = float4{v[0], v[1], v[2], v[3]};
      });
    } else {
      each([](float* address, const float (&v)[4]) { ptx::add_global_4(address, v); });
    }
    if constexpr (kT.turns) {
      __syncwarp();
      if (lane() == 0) ptx::mbarrier_arrive(smem.dquery_full(consumer));
    }
  }
  // Zeros in what the call must not see: keys of this block and of the other's half.
  __device__ __forceinline__ void clear_keys() const {
    const int keys = uniform(tile.clear_keys(params.problem));
    if (keys >= tile.kKeys) return;
    const int number = consumer * 128 + thread();
    const int mine = min(max(keys - 64 * rank, 0), 64);
    const int other = min(max(keys - 64 * (1 - rank), 0), 64);
    clear_rows<4>(smem.key(), mine, 64, number, 256);
    clear_rows<4>(smem.value(), mine, 64, number, 256);
    clear_rows<2>(smem.other_key(), other, 64, number, 256);
    ptx::fence_async_shared();
    ptx::barrier_sync_unaligned(kBoth, 256);
  }
  // Rows of the last query tile of each head, likewise: consumer 0 those of Q, consumer 1 of dO.
  __device__ __forceinline__ void clear_queries(const Ring<2>& ring, int rows) const {
    ptx::mbarrier_wait(smem.query_full(ring.stage), ring.parity);
    ptx::mbarrier_wait(smem.dout_full(ring.stage), ring.parity);
    clear_rows<4>(consumer == 0 ? smem.query(ring.stage) : smem.dout(ring.stage), rows, kQ,
                  thread(), 128);
    ptx::fence_async_shared();
    ptx::barrier_sync_unaligned(kBoth, 256);
  }
};

}  // namespace flash2::sm90
