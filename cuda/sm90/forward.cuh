// The forward for compute capability 9.0: TMA, wgmma and warps of different roles.
#pragma once

#include <cstdint>
#include <utility>

#include "problem.h"
#include "ptx/cluster.cuh"
#include "ptx/common.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/consumer.cuh"
#include "sm90/kernels.h"
#include "sm90/producer.cuh"
#include "sm90/shared_memory.cuh"
#include "sm90/tile_order.cuh"
#include "sm90/tiles.h"

namespace flash2::sm90 {

template <int kTile, DataType kType>
__global__ void __launch_bounds__(kForwardTiles[kTile].threads(),
                                  kForwardTiles[kTile].blocks_per_sm())
    forward(const __grid_constant__ ForwardMaps maps, const __grid_constant__ ForwardParams params,
            const __grid_constant__ ForwardSchedule schedule) {
  constexpr ForwardTile kT = kForwardTiles[kTile];
  if constexpr (kT.masked && !kT.joins) {
    if (!has_work<90>(params.problem)) return;
  }
  extern __shared__ __align__(1024) char shared_memory[];
  const SharedMemory<kTile> smem{ptx::shared_address(shared_memory)};
  // Uniform by the shuffle: as a plain quotient it would make a vector value of every descriptor,
  // and each product would wait for its way into uniform registers.
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
  const Scheduler<kTile> scheduler{maps, params, schedule, smem, lane == 0};
  if (group == 0) {
    if (warp == 1) scheduler.write_first();
    if (threadIdx.x == 0) {
      smem.init_barriers();
      ptx::prefetch_tensor_map(&maps.query);
      ptx::prefetch_tensor_map(&maps.key);
      ptx::prefetch_tensor_map(&maps.value);
    }
  }
  if constexpr (kT.pairs) {  // nobody writes to a peer's barriers before they are there
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
  if (group == 0) {
    ptx::lower_registers<kT.producer_registers()>();
    if (warp == 0) Producer<kTile>{maps, params, schedule, smem, lane == 0}.run();
    if (warp == 1) scheduler.run();
  } else {
    ptx::raise_registers<kT.consumer_registers()>();
    // A lone consumer's number is a constant: what it names takes no barriers of other blocks.
    const int consumer = kT.consumers == 1 ? 0 : group - 1;
    Consumer<kTile, kType>{params, schedule, smem, consumer, warp, lane}.run();
  }
}

template <int kHeadDim, DataType kType, int... kTiles>
const void* find_forward(int tile, std::integer_sequence<int, kTiles...>) {
  const void* found = nullptr;
  const auto consider = [&](auto candidate) {
    constexpr int kTile = decltype(candidate)::value;
    if constexpr (kForwardTiles[kTile].bucket() == kHeadDim) {
      if (tile == kTile) found = reinterpret_cast<const void*>(&forward<kTile, kType>);
    }
  };
  (consider(std::integral_constant<int, kTiles>{}), ...);
  return found;
}

template <int kHeadDim, DataType kType>
const void* forward_kernel(int tile, bool /*general*/) {
  return find_forward<kHeadDim, kType>(tile, std::make_integer_sequence<int, kForwardTileCount>{});
}

}  // namespace flash2::sm90
