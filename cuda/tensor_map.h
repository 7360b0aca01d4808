// Tensor maps, by which the TMA unit of compute capability 9.0 knows an array. Host only.
#pragma once

#include <cuda.h>  // CUtensorMap; nothing of the driver is linked

#include <cstdint>

#include "problem.h"

namespace flash2 {

// An array of a problem, [batch, length, heads, head_dim].
struct Array {
  const void* data;
  Strides stride;
  int32_t batch;
  int32_t length;
  int32_t heads;
  int32_t head_dim;
};

// Describes `array` with boxes of `rows` (at most 256) rows of one head by 64 columns, swizzled:
// ptx/tma.cuh. No axis may be empty. A batch stride of 0 leaves a map with one batch entry. Takes
// about a microsecond and allocates nothing. Returns a cudaError_t. A read brings 256 bytes to the
// L2 cache, or 128 where a row has no more and is read `once`.
int encode_tensor_map(const Array& array, DataType type, int rows, CUtensorMap* map,
                      bool once = false);

// The same with boxes of several heads: `rows` rows, of each `pack` heads, out of one of the
// groups of `group` neighbouring heads. A box reads no head of another group.
int encode_pack_map(const Array& array, DataType type, int group, int pack, int rows,
                    CUtensorMap* map);

// Describes float32 numbers, [heads, length], contiguous, with boxes of `rows` (at most 256) of
// each of `box_heads` heads.
int encode_row_map(const float* data, int64_t heads, int64_t length, int rows, CUtensorMap* map,
                   int box_heads = 1);

}  // namespace flash2
