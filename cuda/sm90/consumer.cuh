// A consumer of a forward block: a warpgroup that computes 64 query rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ptx/cluster.cuh"
#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/forward_scores.cuh"
#include "sm90/join.cuh"
#include "sm90/kernels.h"
#include "sm90/output.cuh"
#include "sm90/shared_memory.cuh"
#include "sm90/work.cuh"

namespace flash2::sm90 {

template <int kTile, DataType kType>
struct Consumer {
  static constexpr ForwardTile kT = kForwardTiles[kTile];
  static constexpr int kD = kT.head_dim, kTileKv = kT.tile_kv;
  static constexpr uint32_t kPanelQ = 64 * 128, kPanelKv = kTileKv * 128;
  using Named = NamedBarriers<kTile>;
  using Scores = float[kTileKv / 2];

  const ForwardParams& params;
  const ForwardSchedule& schedule;
  SharedMemory<kTile> smem;
  int consumer;
  int warp;  // of the consumer
  int lane;
  Ring<kT.stages()> k_ring, v_ring;
  Ring<2> tile_ring;
  Ring<kT.q_stages> q_ring;
  uint32_t q[kT.pairs ? kD / 16 : 1][4];  // of pairs: Q as A operands

  // Of the present tile.
  RowScores<kTile, kType> rows;
  bool pending = false;  // the tile before has yet to be stored
  Output<kType, kT.packs(), kT.out_lanes()> output;
  float norm[2];

  __device__ __forceinline__ void run() {
    if (kT.ping_pong && consumer == 0) ptx::barrier_arrive(Named::turn(0), 256);
    Scores s;
    float o[kD / 2];
    uint32_t probabilities[kTileKv / 16][4];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) o[i] = 0.0f;
    Work work = take_tile();
    wait_for_first(work);
    ptx::wgmma_fence();
    multiply_qk(s);
    rows.start(params.problem, schedule, work, first_row());
    ptx::wgmma_wait<0>();
    ptx::pin(s);
    first_step(work, s, probabilities);
    for (;;) {
      if (!kT.ends_first()) rows.pack(probabilities, s);
      if constexpr (kT.masked) clear_values_past_length(work);

      // Scores of this step's block, output of the block before.
      const auto step = [&](int n, auto adjust) {
        ptx::mbarrier_wait(smem.k_full(k_ring.stage), k_ring.parity);
        multiply(s, o, probabilities);
        ptx::wgmma_wait<1>();
        ptx::pin(s);
        if (!kT.pairs && n + 1 == work.steps) release_q();
        adjust(s);
        rows.exponentiate(s, [&](float sum) { release_k(sum); });
        ptx::wgmma_wait<0>();
        ptx::pin(o);
        ptx::pin(s);
        release_v();
        rows.pack(probabilities, s);
        if (!kT.rescale_early) rows.rescale(o);
      };
      int n = 1;
      if constexpr (kT.masked) {
#pragma unroll 1
        for (; n < work.masked; ++n) {
          const int first_key = work.first_key<kTileKv>(n);
          step(n, [&](Scores& scores) {
            rows.cap(scores);
            rows.template mask<kTileKv>(scores, first_key);
          });
        }
      }
#pragma unroll 1
      for (; n < work.steps; ++n) step(n, [&](Scores& scores) { rows.cap(scores); });

      if constexpr (kT.joins) {
        join(work, o, probabilities);
        return;
      }
      if constexpr (kT.ends_first()) {
        // The next Q begins to come now that this one's place is free: what is left to do of this
        // tile does not wait for it, nor for the next tile's record.
        multiply_pv(o, probabilities);
        const Work next = take_tile();
        q_ring.next();
        finish(work);
        ptx::wgmma_wait<0>();
        ptx::pin(o);
        release_v();
        pending = true;
        if (!next.exists) break;
        wait_for_first(next);
        ptx::wgmma_fence();
        multiply_qk(s);
        store(o);
        rows.start(params.problem, schedule, next, first_row());
        ptx::wgmma_wait<0>();
        ptx::pin(s);
        first_step(next, s, probabilities);
        work = next;
      } else {
        const Work next = take_tile();
        q_ring.next();
        // The last output beside the first scores of the next tile. After the last tile these are
        // computed of what is left in shared memory, and nobody reads them.
        wait_for_first(next);
        multiply(s, o, probabilities);
        finish(work);
        rows.start(params.problem, schedule, next, first_row());
        ptx::wgmma_wait<1>();
        ptx::pin(s);
        if (next.exists) first_step(next, s, probabilities);
        ptx::wgmma_wait<0>();
        ptx::pin(o);
        ptx::pin(s);
        release_v();
        pending = true;
        if (!kT.store_late) store(o);
        if (!next.exists) break;
        work = next;
      }
    }
    store(o);
    if constexpr (kT.pairs) {  // nobody leaves while the peer may still arrive at its barriers
      __syncwarp();
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }

 private:
  // --- Barriers

  __device__ __forceinline__ Work take_tile() {
    ptx::mbarrier_wait(smem.tile_full(tile_ring.stage), tile_ring.parity);
    const Work work = Work::load(smem.tile(tile_ring.stage));
    ptx::mbarrier_arrive(smem.tile_empty(tile_ring.stage));
    tile_ring.next();
    return work;
  }

  // Q and the first K of the tile, if there is one.
  __device__ __forceinline__ void wait_for_first(const Work& work) {
    if (!work.exists) return;
    ptx::mbarrier_wait(smem.q_full(q_ring.stage, consumer), q_ring.parity);
    if (work.scale < 0.0f) flip_q();
    if constexpr (kT.pairs) load_q();
    ptx::mbarrier_wait(smem.k_full(k_ring.stage), k_ring.parity);
  }

  __device__ __forceinline__ void take_turn() {
    if (kT.ping_pong) ptx::barrier_sync(Named::turn(consumer), 256);
  }
  __device__ __forceinline__ void pass_turn() {
    const int next = consumer + 1 == kT.consumers ? 0 : consumer + 1;
    if (kT.ping_pong) ptx::barrier_arrive(Named::turn(next), 256);
  }

  __device__ __forceinline__ void release_q() {
    if (lane == 0) ptx::mbarrier_arrive(smem.q_empty(q_ring.stage, consumer));
  }
  // A stage of K or V, of every block that brings a part of it.
  __device__ __forceinline__ void release(uint32_t empty) {
    if constexpr (kT.pairs) {
      if (lane < kT.blocks()) ptx::mbarrier_arrive_peer(ptx::peer_address(empty, lane));
    } else {
      if (lane == 0) ptx::mbarrier_arrive(empty);
    }
  }
  // `sum` is of the exponentials that must come before. The address depends on it, but only in
  // name: the assembler, which lifts the wait for P V over arithmetic, cannot lift it over this.
  __device__ __forceinline__ void release_k(float sum) {
    const uint32_t nothing = kT.split > 0 ? __float_as_uint(sum) & schedule.zero : 0;
    release(smem.k_empty(k_ring.stage) + nothing);
    k_ring.next();
  }
  __device__ __forceinline__ void release_v() {
    release(smem.v_empty(v_ring.stage));
    v_ring.next();
  }

  // --- Products

  // From shared memory, which then has room for the next tile's.
  __device__ __forceinline__ void load_q() {
    const int row = 16 * warp + lane % 16;
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      const int chunk = (2 * (i % 4) + lane / 16) ^ (row % 8);
      ptx::load_matrix_x4(
          q[i], smem.q(q_ring.stage, consumer) + i / 4 * kPanelQ + 128 * row + 16 * chunk);
    }
    release_q();
  }

  // S = Q K^T of the block to come, O += P V of the block before.
  __device__ __forceinline__ void multiply(Scores& s, float (&o)[kD / 2],
                                           const uint32_t (&probabilities)[kTileKv / 16][4]) {
    take_turn();
    ptx::wgmma_fence();
    multiply_qk(s);
    if (kT.store_late) store(o);
    multiply_pv(o, probabilities);
    pass_turn();
  }

  __device__ __forceinline__ void multiply_qk(Scores& s) {
    // Changes with every step as far as the compiler knows: else it would compute the descriptors
    // of all products of Q before the loop and, short of uniform registers, fetch each from a
    // vector.
    const uint32_t nothing = k_ring.parity & schedule.zero;
    const uint64_t q_rows = ptx::wgmma_descriptor(smem.q(q_ring.stage, consumer) + nothing);
    const uint64_t k_rows = ptx::wgmma_descriptor(smem.k(k_ring.stage));
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      const uint64_t k = ptx::wgmma_advance(k_rows, i / 4 * kPanelKv + i % 4 * 32);
      if constexpr (kT.pairs) {
        ptx::wgmma<kType, false>(s, q[i], k, i != 0);
      } else {
        ptx::wgmma<kType, false, false>(
            s, ptx::wgmma_advance(q_rows, i / 4 * kPanelQ + i % 4 * 32), k, i != 0);
      }
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void multiply_pv(float (&o)[kD / 2],
                                              const uint32_t (&probabilities)[kTileKv / 16][4]) {
    if (kT.rescale_early) rows.rescale(o);
    ptx::mbarrier_wait(smem.v_full(v_ring.stage), v_ring.parity);
    ptx::wgmma_fence();
    const uint64_t v = ptx::wgmma_descriptor(smem.v(v_ring.stage), kPanelKv);
#pragma unroll
    for (int i = 0; i < kTileKv / 16; ++i) {
      ptx::wgmma<kType, true>(o, probabilities[i], ptx::wgmma_advance(v, i * 16 * 128), true);
    }
    ptx::wgmma_commit();
  }

  // --- A tile's begin and end

  // The first of the thread's rows in the tile; 8 below it is the other.
  __device__ __forceinline__ int first_row() const { return 64 * consumer + 16 * warp + lane / 4; }

  __device__ __forceinline__ void store(float (&o)[kD / 2]) {
    if (!pending) return;
    output.store(params.problem, schedule, o, norm);
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) o[i] = 0.0f;
    pending = false;
  }

  __device__ __forceinline__ void finish(const Work& work) {
    const ForwardProblem& p = params.problem;
    output = {p, schedule, work, first_row()};
    float lse[2];
    // One branch for both rows, so that their chains run side by side without sinks.
    const auto finish_rows = [&](auto has_sink) {
      constexpr bool kHasSink = decltype(has_sink)::value;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowPlace<kT.packs()> row(schedule, work, first_row() + 8 * r);
        float sink = kHasSink && row.exists(p) ? p.sinks.at(work.batch, row.head) : 0.0f;
        if constexpr (kT.capped) sink += p.soft_cap;  // as scores: RowScores::cap
        norm[r] = rows.online.finish(r, row.position < work.q_length, rows.factor, kHasSink, sink,
                                     &lse[r]);
        if constexpr (kT.capped) lse[r] -= p.soft_cap;
      }
    };
    if (p.sinks.data != nullptr) {
      finish_rows(std::true_type{});
    } else {
      finish_rows(std::false_type{});
    }
    output.store_lse(p, schedule, lse);
  }

  // The only tile of this block: the last output, and what the other blocks of the cluster have.
  __device__ __forceinline__ void join(const Work& work, float (&o)[kD / 2],
                                       const uint32_t (&probabilities)[kTileKv / 16][4]) {
    multiply_pv(o, probabilities);
    ptx::wgmma_wait<0>();
    ptx::pin(o);
    ptx::barrier_sync(Named::kAllConsumers, SharedMemory<kTile>::kConsumerThreads);
    const Join<kTile, kType> join{params.problem, schedule, smem.k(0),
                                  128 * consumer + 32 * warp + lane};
    join.leave(first_row(), o, rows.online);
    ptx::cluster_arrive();
    ptx::cluster_wait();
    join.make(work, rows.factor);
    __syncwarp();
    // Nobody leaves while others read what it has.
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }

  // A tile's first scores become exponentials.
  __device__ __forceinline__ void first_step(const Work& work, Scores& s,
                                             uint32_t (&probabilities)[kTileKv / 16][4]) {
    if (!kT.pairs && work.steps == 1) release_q();
    rows.exponentiate_first(s, probabilities, work.first, schedule.zero,
                            [&](float sum) { release_k(sum); });
  }

  // --- Corrections in shared memory, which few calls need

  // The softmax wants a positive factor: under a negative scale the consumer flips its Q's sign.
  __device__ __forceinline__ void flip_q() {
    const uint32_t rows = smem.q(q_ring.stage, consumer);
    for (int i = 32 * warp + lane; i < kT.q_bytes() / 4; i += 128) {
      ptx::store_shared(rows + 4 * i, ptx::load_shared(rows + 4 * i) ^ 0x80008000u);
    }
    ptx::fence_async_shared();
    ptx::barrier_sync(Named::consumer(consumer), 128);
  }

  // Keys past kv_length are masked, but their V is multiplied by 0, and it may hold NaN. Only the
  // first block of a tile can hold such keys; past the array TMA itself gives zeros.
  __device__ __forceinline__ void clear_values_past_length(const Work& work) {
    const int length = work.bounds.kv_length;
    const int first = length - work.first;
    if (length == params.problem.seq_kv || first <= 0 || first >= kTileKv) return;
    ptx::mbarrier_wait(smem.v_full(v_ring.stage), v_ring.parity);
    for (int i = 8 * first + 128 * consumer + 32 * warp + lane; i < 8 * kTileKv;
         i += 128 * kT.consumers) {
#pragma unroll
      for (int panel = 0; panel < kD / 64; ++panel) {
        ptx::store_shared_16(smem.v(v_ring.stage) + panel * kPanelKv + 16 * i, uint4{0, 0, 0, 0});
      }
    }
    ptx::fence_async_shared();
    ptx::barrier_sync(Named::kAllConsumers, SharedMemory<kTile>::kConsumerThreads);
  }
};

}  // namespace flash2::sm90
