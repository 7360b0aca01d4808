// Where things lie in the shared memory of a backward block, and the barriers by name.
//
// All tiles are panels of 64 columns as TMA writes and wgmma reads them (ptx/wgmma.cuh). Keys are
// the columns of dS, in two panels.
#pragma once

#include <cstdint>

#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "sm90/backward_tiles.h"
#include "sm90/ring.cuh"

namespace flash2::sm90 {

template <int kTile>
struct BackwardMemory {
  static constexpr BackwardTile kT = kBackwardTiles[kTile];
  static constexpr int kRow = 128;  // bytes of a panel's row
  static constexpr int kQueryPanel = kT.tile_q * kRow, kKeyPanel = kT.keys() * kRow;
  uint32_t base;

  __device__ __forceinline__ uint32_t key() const { return base; }
  __device__ __forceinline__ uint32_t value() const { return key() + kT.kv_bytes(); }
  __device__ __forceinline__ uint32_t query(uint32_t stage) const {
    return value() + kT.kv_bytes() + stage * kT.stage_bytes();
  }
  __device__ __forceinline__ uint32_t dout(uint32_t stage) const {
    return query(2) + stage * kT.stage_bytes();
  }
  __device__ __forceinline__ uint32_t ds(uint32_t stage) const {
    return dout(2) + stage * kT.ds_bytes();
  }
  // A consumer's half of the float32 dQ of a step.
  __device__ __forceinline__ uint32_t dquery(int consumer) const {
    return ds(2) + consumer * kT.stage_bytes();
  }
  // The float32 sums of a step's dQ, on their way to becoming dQ.
  __device__ __forceinline__ uint32_t sums() const { return dquery(2); }
  // Pair: half of the columns of the other block's keys.
  __device__ __forceinline__ uint32_t other_key() const { return ds(1); }
  __device__ __forceinline__ uint32_t lse2(uint32_t stage) const {
    return base + kT.tiles_bytes() + stage * kT.rows_bytes();
  }
  __device__ __forceinline__ uint32_t delta(uint32_t stage) const { return lse2(2 + stage); }
  // Of a KeyTile.
  static __device__ __forceinline__ constexpr int tile_offset(uint32_t stage) {
    return kT.tiles_bytes() + 4 * kT.rows_bytes() + 64 * stage;
  }

  // `full`: what is brought has landed. `empty`: all readers are done with it.
  __device__ __forceinline__ uint32_t key_full() const { return barrier(0); }
  __device__ __forceinline__ uint32_t key_empty() const { return barrier(1); }
  __device__ __forceinline__ uint32_t value_full() const { return barrier(2); }
  __device__ __forceinline__ uint32_t value_empty() const { return barrier(3); }
  __device__ __forceinline__ uint32_t query_full(uint32_t stage) const {
    return barrier(4 + stage);
  }
  __device__ __forceinline__ uint32_t query_empty(uint32_t stage) const {
    return barrier(6 + stage);
  }
  __device__ __forceinline__ uint32_t dout_full(uint32_t stage) const {
    return barrier(8 + stage);
  }
  __device__ __forceinline__ uint32_t dout_empty(uint32_t stage) const {
    return barrier(10 + stage);
  }
  // Of the key tile that the producer writes.
  __device__ __forceinline__ uint32_t tile_full(uint32_t stage) const {
    return barrier(12 + stage);
  }
  __device__ __forceinline__ uint32_t tile_empty(uint32_t stage) const {
    return barrier(14 + stage);
  }
  // Of each consumer's dQ; where storers take every second step each, at even and at odd steps.
  // Pair: it has been added, and may be added.
  __device__ __forceinline__ uint32_t dquery_full(int consumer, uint32_t odd = 0) const {
    return barrier(16 + 2 * odd + consumer);
  }
  __device__ __forceinline__ uint32_t dquery_empty(int consumer) const {
    return barrier(20 + consumer);
  }
  // Pair: of P^T on its way from one warpgroup to the other, and of the whole dS.
  __device__ __forceinline__ uint32_t p_full() const { return barrier(22); }
  __device__ __forceinline__ uint32_t ds_full() const { return barrier(23); }
  __device__ __forceinline__ uint32_t ds_empty() const { return barrier(24); }

  // Where there is a finisher: of its sums.
  __device__ __forceinline__ uint32_t sums_full() const { return barrier(25); }
  // Pair: of the next key tile's number; `empty`, in block 0: block 1 has read it.
  __device__ __forceinline__ uint32_t number_full() const { return barrier(26); }
  __device__ __forceinline__ uint32_t number_empty() const { return barrier(27); }
  // No barriers: that number, and whether a consumer's dQ is the first of its sums.
  __device__ __forceinline__ uint32_t number() const { return barrier(28); }
  __device__ __forceinline__ uint32_t is_first(int consumer) const {
    return barrier(29) + 4 * consumer;
  }

  // By one thread; a barrier of the block (of the cluster) follows.
  __device__ __forceinline__ void init_barriers() const {
    constexpr int kConsumerWarps = 8;
    constexpr bool kPair = kT.blocks == 2;
    // Who reads a key tile's record arrives itself: racecheck does not follow a __syncwarp to
    // another lane's arrival, and takes the next write for a hazard. Pair: whole warps wait for
    // turns.
    constexpr int kStorerThreads = kPair ? (kT.turns ? 64 : 0) : 2;
    // Pair: its gradients leave through K and V, which are free when one thread has seen the last
    // of them read.
    constexpr int kLastReaders = kPair ? 1 : kConsumerWarps;
    ptx::mbarrier_init(key_full(), 1);
    ptx::mbarrier_init(key_empty(), kLastReaders);
    ptx::mbarrier_init(value_full(), 1);
    ptx::mbarrier_init(value_empty(), kLastReaders);
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(query_full(i), 1);
      ptx::mbarrier_init(query_empty(i), kT.blocks * kConsumerWarps);
      ptx::mbarrier_init(dout_full(i), 1);
      ptx::mbarrier_init(dout_empty(i), kT.blocks * kConsumerWarps);
      ptx::mbarrier_init(tile_full(i), 1);
      ptx::mbarrier_init(tile_empty(i), 32 * kConsumerWarps + kStorerThreads);
      ptx::mbarrier_init(dquery_full(i, 0), 4);  // a consumer's warps
      ptx::mbarrier_init(dquery_full(i, 1), 4);
      ptx::mbarrier_init(dquery_empty(i), 1);
    }
    ptx::mbarrier_init(p_full(), 4);
    ptx::mbarrier_init(number_full(), 1);
    ptx::mbarrier_init(number_empty(), 1);
    ptx::mbarrier_init(sums_full(), 1);
    ptx::mbarrier_init(ds_full(), 1);
    ptx::mbarrier_init(ds_empty(), kT.blocks * kConsumerWarps);
    ptx::mbarrier_init_fence();
  }

 private:
  __device__ __forceinline__ uint32_t barrier(uint32_t number) const {
    return base + kT.smem_bytes() - kT.barriers_bytes() + 8 * number;
  }
};

// Zeros in rows [first, rows) of a tile of kPanels panels, by `threads` threads. To be followed by
// fence_async_shared and a barrier: wgmma reads it.
template <int kPanels>
__device__ __forceinline__ void clear_rows(uint32_t tile, int first, int rows, int thread,
                                           int threads) {
  const int words = (rows - first) * 8;  // of 16 bytes, in a panel
  for (int i = thread; i < kPanels * words; i += threads) {
    const int panel = i / words;
    ptx::store_shared_16(tile + panel * rows * 128 + first * 128 + (i - panel * words) * 16,
                         uint4{0, 0, 0, 0});
  }
}

}  // namespace flash2::sm90
