// What the launches of passes and families share.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "plan.h"
#include "problem.h"

namespace flash2 {

inline constexpr int kMaxDevices = 64;

// The kernel for a dtype and a bucket of head_dim: what find(head_dim, type) names, both constants
// of the compiler; or null.
template <class Find>
const void* find_kernel(DataType type, int32_t head_dim, const Find& find) {
  const auto of_type = [&](auto constant) -> const void* {
    switch (head_dim) {
      case 64:
        return find(std::integral_constant<int, 64>(), constant);
      case 128:
        return find(std::integral_constant<int, 128>(), constant);
      case 256:
        return find(std::integral_constant<int, 256>(), constant);
    }
    return nullptr;
  };
  if (type == DataType::kFloat16) {
    return of_type(std::integral_constant<DataType, DataType::kFloat16>());
  }
  return of_type(std::integral_constant<DataType, DataType::kBFloat16>());
}

// More than 48 KB of shared memory must be asked for, once per kernel and device. Two threads that
// ask at once do no harm. One object for up to 64 kernels.
class SmemAllowance {
 public:
  cudaError_t ask(const void* kernel, int bit, uint32_t bytes) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    const uint64_t mask = uint64_t{1} << bit;
    if (device < kMaxDevices && (done_[device].load(std::memory_order_relaxed) & mask)) {
      return cudaSuccess;
    }
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error == cudaSuccess && device < kMaxDevices) {
      done_[device].fetch_or(mask, std::memory_order_relaxed);
    }
    return error;
  }

 private:
  std::atomic<uint64_t> done_[kMaxDevices] = {};
};

namespace sm90 {

// launch_forward for a plan of this family.
int launch_forward(const ForwardProblem& problem, const ForwardPlan& plan, void* workspace,
                   CUstream_st* stream);

}  // namespace sm90
}  // namespace flash2
