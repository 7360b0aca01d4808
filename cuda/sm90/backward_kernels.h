// The backward kernels of the sm90 family by name, and what they receive. Each head_dim and dtype
// is instantiated in a translation unit of its own, generated from instance.cu.in.
#pragma once

#include <cuda.h>  // CUtensorMap; nothing of the driver is linked

#include "problem.h"

namespace flash2::sm90 {

struct BackwardMaps {
  CUtensorMap query;  // boxes of tile_q rows
  CUtensorMap dout;
  CUtensorMap key;  // boxes of keys() rows
  CUtensorMap value;
  CUtensorMap dkey;  // boxes of 64 rows
  CUtensorMap dvalue;
  CUtensorMap lse2;  // boxes of tile_q rows
  CUtensorMap delta;
  CUtensorMap sums;  // of dQ, 256 numbers a row; boxes of a step's. Where there is a finisher
};

// The kernel for an index into kBackwardTiles of this head_dim, or null. It takes a BackwardMaps
// and a BackwardParams.
template <int kHeadDim, DataType kType>
const void* backward_kernel(int tile, bool general);

}  // namespace flash2::sm90
