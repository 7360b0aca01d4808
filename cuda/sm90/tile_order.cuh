// The scheduler of a forward block: one warp that decides which tile comes next.
#pragma once

#include <cstdint>

#include "params.h"
#include "ptx/mbarrier.cuh"
#include "sm90/counter.cuh"
#include "sm90/kernels.h"
#include "sm90/shared_memory.cuh"
#include "sm90/work.cuh"

namespace flash2::sm90 {

template <int kTile>
struct Scheduler {
  const ForwardParams& params;
  const ForwardSchedule& schedule;
  SharedMemory<kTile> smem;
  bool leader;

  // Before the block's first barrier, beside the start of the barriers.
  __device__ __forceinline__ void write_first() const { write(first(), 0); }

  __device__ __forceinline__ void run() const {
    if (leader) ptx::mbarrier_arrive(smem.tile_full(0));
    uint32_t tile = first();
    Ring<2> ring;
    uint32_t wanted = 0;
    if (schedule.next != nullptr && leader) schedule.next->join(schedule.key);
    while (tile < schedule.tiles) {
      ptx::mbarrier_wait_warp(smem.tile_wanted(), wanted);
      wanted ^= 1;
      if (kForwardTiles[kTile].joins) {
        tile = schedule.tiles;
      } else if (schedule.next == nullptr) {
        tile += gridDim.x;
      } else {
        if (leader) tile = gridDim.x + schedule.next->take(schedule.tiles);
        tile = __shfl_sync(~0u, tile, 0);
      }
      ring.next();
      ptx::mbarrier_wait_warp(smem.tile_empty(ring.stage), ring.parity ^ 1);
      write(tile, ring.stage);
      if (leader) ptx::mbarrier_arrive(smem.tile_full(ring.stage));
    }
  }

 private:
  __device__ __forceinline__ uint32_t first() const {
    return kForwardTiles[kTile].joins ? blockIdx.x / schedule.splits : blockIdx.x;
  }
  __device__ __forceinline__ void write(uint32_t tile, uint32_t stage) const {
    const Work work = Work::find<kTile>(params, schedule, tile);
    if (leader) work.store(smem.tile(stage));
  }
};

}  // namespace flash2::sm90
