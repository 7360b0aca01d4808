// The backward's main kernel for compute capability 9.0, head_dim up to 128: one block takes tiles
// of 128 keys. A producer warpgroup brings Q and dO and carries away the gradients, two consumer
// warpgroups compute. README.md walks through it.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "params.h"
#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/backward_consumer.cuh"
#include "sm90/backward_finish.cuh"
#include "sm90/backward_kernels.h"
#include "sm90/backward_memory.cuh"
#include "sm90/backward_pair.cuh"
#include "sm90/backward_producer.cuh"
#include "sm90/backward_tiles.h"
#include "sm90/backward_work.cuh"

namespace flash2::sm90 {

template <int kTile, DataType kType>
__global__ void __launch_bounds__(kBackwardTiles[kTile].threads(), 1)
    backward(const __grid_constant__ BackwardMaps maps,
             const __grid_constant__ BackwardParams params) {
  constexpr BackwardTile kT = kBackwardTiles[kTile];
  using Memory = BackwardMemory<kTile>;
  using Tile = KeyTile<kTile>;
  static_assert(2 * sizeof(Tile) <= 128);
  extern __shared__ __align__(1024) char shared_memory[];
  const Memory smem{ptx::shared_address(shared_memory)};
  Tile* tiles = reinterpret_cast<Tile*>(shared_memory + Memory::tile_offset(0));
  const int group = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x / 32 % 4);
  const bool leader = threadIdx.x % 32 == 0;

  if (threadIdx.x == 0) smem.init_barriers();
  __syncthreads();
  ptx::launch_dependents();

  if (group == 0) {
    ptx::lower_registers<24>();
    if (warp == 0) {
      BackwardProducer<kTile>{maps, params, smem, tiles, leader}.run();
    } else if (warp < 3 && leader) {
      BackwardStorer<kTile>{params, smem, tiles, warp - 1}.run(maps);
    } else if constexpr (kT.finishes()) {
      if (warp == 3 && params.finish_inside) {
        BackwardFinisher<kTile, kType>{maps, params, smem}.run();
      }
    }
  } else {
    ptx::raise_registers<240>();
    consume<kTile, kType>(params, smem, tiles, group - 1, warp);
  }
}

template <int kHeadDim, DataType kType, int... kTiles>
const void* find_backward(int tile, std::integer_sequence<int, kTiles...>) {
  const void* found = nullptr;
  const auto consider = [&](auto candidate) {
    constexpr int kTile = decltype(candidate)::value;
    if constexpr (kBackwardTiles[kTile].head_dim == kHeadDim) {
      if (tile != kTile) return;
      if constexpr (kBackwardTiles[kTile].blocks == 2) {
        found = reinterpret_cast<const void*>(&backward_pair<kTile, kType>);
      } else {
        found = reinterpret_cast<const void*>(&backward<kTile, kType>);
      }
    }
  };
  (consider(std::integral_constant<int, kTiles>{}), ...);
  return found;
}

// No kernel of this family is `general`: the plan leaves such problems to sm80's.
template <int kHeadDim, DataType kType>
const void* backward_kernel(int tile, bool general) {
  if (general) return nullptr;
  return find_backward<kHeadDim, kType>(tile,
                                        std::make_integer_sequence<int, kBackwardTileCount>{});
}

}  // namespace flash2::sm90
