// The launch of the forward; with launch_backward.cc, all that talks to the CUDA runtime.

#include "launch.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "params.h"
#include "plan.h"
#include "problem.h"
#include "segment_intervals.h"
#include "sm80/kernels.h"
#include "sm80/tiles.h"
#include "sm90/choose.h"

namespace flash2 {

int query_device(int ordinal, Device* device) {
  // A device's facts do not change; each word of the cache is written with the same value by all.
  static std::atomic<int32_t> cache[kMaxDevices][4];
  const bool cached = ordinal >= 0 && ordinal < kMaxDevices;
  int32_t facts[4] = {};
  if (cached) {
    for (int i = 0; i < 4; ++i) facts[i] = cache[ordinal][i].load(std::memory_order_acquire);
  }
  if (facts[0] == 0) {
    int minor = 0;
    const struct {
      int* value;
      cudaDeviceAttr attribute;
    } asked[] = {{&facts[0], cudaDevAttrComputeCapabilityMajor},
                 {&minor, cudaDevAttrComputeCapabilityMinor},
                 {&facts[1], cudaDevAttrMultiProcessorCount},
                 {&facts[2], cudaDevAttrMaxSharedMemoryPerBlockOptin},
                 {&facts[3], cudaDevAttrMaxSharedMemoryPerMultiprocessor}};
    for (const auto& a : asked) {
      const cudaError_t error = cudaDeviceGetAttribute(a.value, a.attribute, ordinal);
      if (error != cudaSuccess) return error;
    }
    facts[0] = 10 * facts[0] + minor;
    if (cached) {
      for (int i = 3; i >= 0; --i) cache[ordinal][i].store(facts[i], std::memory_order_release);
    }
  }
  *device = Device{facts[0], facts[1], facts[2], facts[3]};
  return cudaSuccess;
}

int launch_forward(const ForwardProblem& problem, const ForwardPlan& plan, void* workspace,
                   CUstream_st* stream) {
  if (plan.status != PlanStatus::kOk) return cudaErrorInvalidValue;
  if (plan.empty) return cudaSuccess;
  if (plan.workspace_bytes > 0 && workspace == nullptr) return cudaErrorInvalidValue;
  if (plan.family == 90 && !plan.otherwise.empty()) {
    ForwardProblem found = problem;
    char* segments = static_cast<char*>(workspace) + sm90::kCounterBytes;
    if (int error = find_segment_intervals(&found, segments, stream)) return error;
    if (int error = sm90::launch_forward(found, plan, workspace, stream)) return error;
    return launch_forward(found, plan.otherwise.front(), nullptr, stream);
  }
  if (plan.family == 90) return sm90::launch_forward(problem, plan, workspace, stream);
  const bool bfloat16 = problem.data_type == DataType::kBFloat16;
  const void* kernel =
      find_kernel(problem.data_type, plan.head_dim, [&](auto head_dim, auto type) {
        return sm80::forward_kernel<head_dim(), type()>(plan.variant, plan.general);
      });
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  static_assert(4 * sm80::kForwardTileCount <= 64);
  const int bit = 4 * plan.variant + 2 * bfloat16 + plan.general;
  static SmemAllowance allowance;
  if (const cudaError_t error = allowance.ask(kernel, bit, plan.smem_bytes);
      error != cudaSuccess) {
    return error;
  }
  ForwardParams params = make_params(problem, plan);
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, dim3(plan.grid), dim3(plan.block), arguments, plan.smem_bytes,
                          stream);
}

}  // namespace flash2
