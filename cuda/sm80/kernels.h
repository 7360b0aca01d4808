// The kernels of the sm80 family by name. Each is instantiated in a translation unit of its own,
// generated from instance.cu.in.
#pragma once

#include "problem.h"

namespace flash2::sm80 {

// The kernel for an index into kForwardTiles of this head_dim, or null. It takes a ForwardParams.
template <int kHeadDim, DataType kType>
const void* forward_kernel(int tile, bool general);

// Likewise for kBackwardTiles; it takes a BackwardParams.
template <int kHeadDim, DataType kType>
const void* backward_kernel(int tile, bool general);

}  // namespace flash2::sm80
