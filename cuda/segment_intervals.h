// Packed segments as intervals.
#pragma once

#include "problem.h"

struct CUstream_st;

namespace flash2 {

// Enqueues the kernel that finds them, with its results in `workspace` (a SegmentWorkspace), and
// lets the problem know of these. Returns a cudaError_t.
int find_segment_intervals(Problem* problem, void* workspace, CUstream_st* stream);

}  // namespace flash2
