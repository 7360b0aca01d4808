// Where things lie in the shared memory of a forward block, and the barriers by name.
//
// Q, K and V are panels of 64 columns as TMA writes and wgmma reads them (ptx/wgmma.cuh). Each
// consumer has Q rows of its own. K and V have two stages each.
#pragma once

#include <cstdint>

#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "sm90/tiles.h"

namespace flash2::sm90 {

// A place in a ring of kStages, and the parity of its barriers there.
template <int kStages>
struct Ring {
  uint32_t stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    stage = kStages == 1 ? 0 : stage ^ 1;
    parity ^= stage == 0;
  }
};

template <int kTile>
struct SharedMemory {
  static constexpr ForwardTile kT = kForwardTiles[kTile];
  static constexpr int kStages = 2, kConsumerThreads = 128 * kT.consumers;
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
  __device__ __forceinline__ uint32_t k_full(uint32_t stage) const { return barrier(stage); }
  __device__ __forceinline__ uint32_t k_empty(uint32_t stage) const { return barrier(2 + stage); }
  __device__ __forceinline__ uint32_t v_full(uint32_t stage) const { return barrier(4 + stage); }
  __device__ __forceinline__ uint32_t v_empty(uint32_t stage) const { return barrier(6 + stage); }
  // Of the number of the next tile, which the producer writes.
  __device__ __forceinline__ uint32_t tile_full(uint32_t stage) const {
    return barrier(8 + stage);
  }
  __device__ __forceinline__ uint32_t tile_empty(uint32_t stage) const {
    return barrier(10 + stage);
  }
  __device__ __forceinline__ uint32_t q_full(uint32_t stage, int consumer) const {
    return barrier(12 + stage * kT.consumers + consumer);
  }
  __device__ __forceinline__ uint32_t q_empty(uint32_t stage, int consumer) const {
    return barrier(12 + (kT.q_stages + stage) * kT.consumers + consumer);
  }
  __device__ __forceinline__ uint32_t tile_number(uint32_t stage) const {
    return barrier(12 + 2 * kT.q_stages * kT.consumers) + 4 * stage;
  }

  __device__ __forceinline__ void init_barriers() const {
    for (uint32_t stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(k_full(stage), 1);
      ptx::mbarrier_init(k_empty(stage), 4 * kT.consumers);  // one arrival per warp
      ptx::mbarrier_init(v_full(stage), 1);
      ptx::mbarrier_init(v_empty(stage), 4 * kT.consumers);
      ptx::mbarrier_init(tile_full(stage), 1);
      ptx::mbarrier_init(tile_empty(stage), kConsumerThreads);
    }
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
    return base + kT.smem_bytes() - kT.barrier_bytes() + 8 * number;
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
