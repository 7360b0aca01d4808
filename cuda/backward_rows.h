// The kernels before and after the backward's main kernel, which work by query rows: the same for
// every family. They take a BackwardParams and plan.rows_grid blocks.
#pragma once

#include <cstdint>

#include "problem.h"

namespace flash2 {

inline constexpr int kPrepareThreads = 256;
inline constexpr int kFinishThreads = 128;

// For a bucket of head_dim. Before: logsumexps and deltas as the main kernel takes them, and zeros
// in the sums of dQ and in what orders them. After: dQ from its sums.
const void* prepare_rows_kernel(DataType type, int head_dim);
const void* finish_rows_kernel(DataType type, int head_dim);

// P travels inside the main kernel times 2^12, so that float16 holds small probabilities with all
// its bits: the logsumexp in powers of two is that much smaller, the delta divided by it.
inline constexpr float kProbabilityExponent = 12.0f;
inline constexpr float kProbabilityUnit = 1.0f / 4096.0f;

}  // namespace flash2
