// What the families' launches share. Host only.
#pragma once

#include <atomic>
#include <cstdint>

#include "plan.h"
#include "problem.h"

namespace flash2 {

inline constexpr int kMaxDevices = 64;

// Bit i of word d: kernel i may use its shared memory on device d.
using SmemAllowed = std::atomic<uint64_t>[kMaxDevices];

// More than 48 KB of shared memory must be asked for, once per kernel and device. Two threads that
// ask at once do no harm. Returns a cudaError_t.
int allow_smem(const void* kernel, int bit, uint32_t bytes, SmemAllowed& allowed);

namespace sm90 {

// launch_forward for a plan of this family.
int launch_forward(const ForwardProblem& problem, const ForwardPlan& plan, void* workspace,
                   CUstream_st* stream);

}  // namespace sm90
}  // namespace flash2
