// Where things lie in the shared memory of a forward block, and the barriers by name.
//
// Q, K and V are panels of 64 columns as TMA writes and wgmma reads them (ptx/wgmma.cuh). Each
// consumer has Q rows of its own.
#pragma once

#include <cstdint>

#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "sm90/ring.cuh"
#include "sm90/tiles.h"
#include "sm90/work.cuh"

namespace flash2::sm90 {

template <int kTile>
struct SharedMemory {
  static constexpr ForwardTile kT = kForwardTiles[kTile];
  static constexpr int kStages = kT.stages(), kConsumerThreads = 128 * kT.consumers;
  // Barriers by number, `full` before `empty`.
  static constexpr int kK = 0, kV = 2 * kStages, kTileRing = 4 * kStages, kQ = kTileRing + 5;
  static_assert(8 * (kQ + 2 * kT.q_stages * kT.consumers) + 2 * Work::kBytes <= kT.state_bytes());
  // Warps that read a stage of K or V, each with one arrival; of both blocks of a pair.
  static constexpr int kReaders = 4 * kT.consumers * kT.blocks();
  uint32_t base;

  __device__ __forceinline__ uint32_t q(uint32_t stage, int consumer) const {
    return base + (stage * kT.consumers + consumer) * kT.q_bytes();
  }
  __device__ __forceinline__ uint32_t k(uint32_t stage) const {
    return q(kT.q_stages, 0) + stage * kT.kv_bytes();
  }
  __device__ __forceinline__ uint32_t v(uint32_t stage) const {
    return k(kStages) + stage * kT.kv_bytes();
  }

  // `full`: what TMA brings has landed. `empty`: all readers are done, so TMA may write again.
  __device__ __forceinline__ uint32_t k_full(uint32_t stage) const { return barrier(kK + stage); }
  __device__ __forceinline__ uint32_t k_empty(uint32_t stage) const {
    return barrier(kK + kStages + stage);
  }
  __device__ __forceinline__ uint32_t v_full(uint32_t stage) const { return barrier(kV + stage); }
  __device__ __forceinline__ uint32_t v_empty(uint32_t stage) const {
    return barrier(kV + kStages + stage);
  }
  // Of the record of a tile, which the scheduler writes.
  __device__ __forceinline__ uint32_t tile_full(uint32_t stage) const {
    return barrier(kTileRing + stage);
  }
  __device__ __forceinline__ uint32_t tile_empty(uint32_t stage) const {
    return barrier(kTileRing + 2 + stage);
  }
  // The producer nears the end of its tile.
  __device__ __forceinline__ uint32_t tile_wanted() const { return barrier(kTileRing + 4); }
  __device__ __forceinline__ uint32_t q_full(uint32_t stage, int consumer) const {
    return barrier(kQ + stage * kT.consumers + consumer);
  }
  __device__ __forceinline__ uint32_t q_empty(uint32_t stage, int consumer) const {
    return barrier(kQ + (kT.q_stages + stage) * kT.consumers + consumer);
  }
  __device__ __forceinline__ uint32_t tile(uint32_t stage) const {
    return base + kT.smem_bytes() - (2 - stage) * Work::kBytes;
  }

  __device__ __forceinline__ void init_barriers() const {
    for (uint32_t stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(k_full(stage), 1);
      ptx::mbarrier_init(k_empty(stage), kReaders);
      ptx::mbarrier_init(v_full(stage), 1);
      ptx::mbarrier_init(v_empty(stage), kReaders);
    }
    for (uint32_t stage = 0; stage < 2; ++stage) {
      ptx::mbarrier_init(tile_full(stage), 1);
      ptx::mbarrier_init(tile_empty(stage), kConsumerThreads + 32);
    }
    ptx::mbarrier_init(tile_wanted(), 1);
    for (uint32_t stage = 0; stage < kT.q_stages; ++stage) {
      for (int consumer = 0; consumer < kT.consumers; ++consumer) {
        ptx::mbarrier_init(q_full(stage, consumer), 1);
        ptx::mbarrier_init(q_empty(stage, consumer), 4);
      }
    }
    ptx::mbarrier_init_fence();
  }

 private:
  __device__ __forceinline__ uint32_t barrier(uint32_t number) const {
    return base + kT.smem_bytes() - kT.state_bytes() + 8 * number;
  }
};

// Named barriers; 0 is __syncthreads.
template <int kTile>
struct NamedBarriers {
  static constexpr int kAllConsumers = 1;
  FLASH2_HOST_DEVICE static constexpr int consumer(int c) {
    return 2 + c;
  }  // the four warps of one consumer
  FLASH2_HOST_DEVICE static constexpr int turn(int c) {
    return 5 + c;
  }  // consumer c may use the tensor cores
};

}  // namespace flash2::sm90
