// The scheduler of a forward block: one warp that decides which tile comes next.
#pragma once

#include <cstdint>

#include "params.h"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "sm90/counter.cuh"
#include "sm90/kernels.h"
#include "sm90/shared_memory.cuh"
#include "sm90/work.cuh"

namespace flash2::sm90 {

template <int kTile>
struct Scheduler {
  static constexpr ForwardTile kT = kForwardTiles[kTile];

  const ForwardMaps& maps;
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
      if (kT.joins) {
        tile = schedule.tiles;
      } else if (schedule.next == nullptr) {
        tile += gridDim.x;
      } else {
        if (leader) tile = gridDim.x + schedule.next->take(schedule.tiles);
        tile = __shfl_sync(~0u, tile, 0);
      }
      ring.next();
      ptx::mbarrier_wait_warp(smem.tile_empty(ring.stage), ring.parity ^ 1);
      const Work work = write(tile, ring.stage);
      if (leader) ptx::mbarrier_arrive(smem.tile_full(ring.stage));
      if (kT.prefetches_q() && leader && work.exists) prefetch_q(work);
    }
  }

 private:
  __device__ __forceinline__ void prefetch_q(const Work& work) const {
    const int batch = params.problem.query_stride.batch == 0 ? 0 : work.batch;
    const int head = work.head - work.head_kv * schedule.group;
    for (int row = work.row0; row < work.row0 + kT.tile_q(); row += 64) {
      for (int column = 0; column < kT.head_dim; column += 64) {
        ptx::tma_prefetch_pack(&maps.query, column, head, row, work.head_kv, batch);
      }
    }
  }
  __device__ __forceinline__ uint32_t first() const {
    return kT.joins ? blockIdx.x / schedule.splits : blockIdx.x;
  }
  __device__ __forceinline__ Work write(uint32_t tile, uint32_t stage) const {
    const Work work = Work::find<kTile>(params, schedule, tile);
    if (leader) work.store(smem.tile(stage));
    return work;
  }
};

}  // namespace flash2::sm90
