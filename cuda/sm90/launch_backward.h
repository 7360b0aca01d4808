// Enqueues the sm90 family's main kernel of a backward.
#pragma once

#include "params.h"
#include "plan.h"
#include "problem.h"

struct CUstream_st;

namespace flash2::sm90 {

// After the rows have been prepared, of which it may begin before they are done. Returns a
// cudaError_t.
int launch_backward(const BackwardProblem& problem, const BackwardPlan& plan,
                    BackwardParams& params, CUstream_st* stream);

}  // namespace flash2::sm90
