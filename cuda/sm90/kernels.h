// The kernels of the sm90 family by name, and what they receive. Each head_dim and dtype is
// instantiated in a translation unit of its own, generated from instance.cu.in.
#pragma once

#include <cuda.h>  // CUtensorMap; nothing of the driver is linked

#include <cstdint>

#include "params.h"
#include "problem.h"

namespace flash2 {
class TileCounter;
}

namespace flash2::sm90 {

struct ForwardMaps {
  CUtensorMap query;  // boxes of 64 rows: positions, of each the heads of the pack
  CUtensorMap key;    // boxes of the rows of a block of keys that one block brings
  CUtensorMap value;
};

struct ForwardSchedule {
  uint32_t tiles;
  uint32_t zero;      // 0; the compiler does not know
  TileCounter* next;  // null: a block's tiles follow each other by the grid's size
  uint64_t key;       // of this launch: counter.cuh
  int pack_shift;     // the plan's pack is 1 << pack_shift
  int group;          // query heads per key head
  int splits;         // the plan's
};

// The kernel for an index into kForwardTiles of this bucket, or null. It takes a ForwardMaps, a
// ForwardParams and a ForwardSchedule.
template <int kHeadDim, DataType kType>
const void* forward_kernel(int tile, bool general);

}  // namespace flash2::sm90
