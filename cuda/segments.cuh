// Segment ids: a query row sees only keys of its own id. Ids come in any order, but usually
// packed, so ranges of ids rule out most blocks. (Hopper's kernels take packed ones alone, as
// intervals: segment_intervals.cu.)
#pragma once

#include <climits>
#include <cstdint>

#include "mask.cuh"
#include "problem.h"
#include "ptx/common.cuh"

namespace flash2 {

struct IdRange {
  int lowest = INT_MAX;
  int highest = INT_MIN;

  __device__ __forceinline__ void add(int id) {
    lowest = min(lowest, id);
    highest = max(highest, id);
  }
  // Over the lanes of a warp.
  __device__ __forceinline__ void join_warp() {
    lowest = __reduce_min_sync(~0u, lowest);
    highest = __reduce_max_sync(~0u, highest);
  }
  // Over the warps of a block, through 2 * kWarps words of shared memory.
  template <int kWarps>
  __device__ __forceinline__ void join_block(uint32_t scratch) {
    join_warp();
    const int warp = threadIdx.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
      ptx::store_shared(scratch + 8 * warp, lowest);
      ptx::store_shared(scratch + 8 * warp + 4, highest);
    }
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      lowest = min(lowest, static_cast<int>(ptx::load_shared(scratch + 8 * w)));
      highest = max(highest, static_cast<int>(ptx::load_shared(scratch + 8 * w + 4)));
    }
    __syncthreads();
  }
  __device__ __forceinline__ bool single() const { return lowest == highest; }
  __device__ __forceinline__ bool disjoint(const IdRange& other) const {
    return lowest > other.highest || highest < other.lowest;
  }
};

// The keys between the first and the last of [begin, end) whose id lies in the range of the ids of
// query rows [first, last]. All threads of the block take part and get the same answer.
template <int kWarps>
__device__ __forceinline__ Interval segment_keys(const int* query_ids, const int* key_ids,
                                                 int first, int last, int begin, int end,
                                                 uint32_t scratch) {
  IdRange ids, keys;
  for (int row = first + threadIdx.x; row <= last; row += 32 * kWarps) ids.add(query_ids[row]);
  ids.join_block<kWarps>(scratch);
  for (int key = begin + threadIdx.x; key < end; key += 32 * kWarps) {
    const int id = key_ids[key];
    if (id >= ids.lowest && id <= ids.highest) keys.add(key);
  }
  keys.join_block<kWarps>(scratch);
  return keys.highest < keys.lowest ? Interval{0, 0} : Interval{keys.lowest, keys.highest + 1};
}

}  // namespace flash2
