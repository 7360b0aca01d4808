// Enqueues the three kernels of a backward: launch.cc's counterpart.

#include "sm90/launch_backward.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "backward_rows.h"
#include "launch.h"
#include "params.h"
#include "plan.h"
#include "problem.h"
#include "segment_intervals.h"
#include "sm80/kernels.h"
#include "sm80/tiles.h"

namespace flash2 {
namespace {

// Where a size is 0 no kernel divides by it.
Divisor divisor(int64_t size) {
  return Divisor(static_cast<uint32_t>(std::max<int64_t>(size, 1)));
}

BackwardParams make_params(const BackwardProblem& problem, const BackwardPlan& plan, char* base) {
  const BackwardWorkspace& w = plan.workspace;
  // Without query rows nothing is added, and nobody would set the counters to 0.
  const bool waits = (plan.family == 90 || problem.deterministic) && plan.rows_grid != 0;
  return {problem,
          reinterpret_cast<float*>(base + w.dquery),
          reinterpret_cast<float*>(base + w.lse2),
          reinterpret_cast<float*>(base + w.delta),
          waits ? reinterpret_cast<int32_t*>(base + w.turns) : nullptr,
          reinterpret_cast<int32_t*>(base + w.finished),
          reinterpret_cast<int32_t*>(base + w.ticket),
          plan.first_stores,
          plan.transposed_sums,
          plan.finish_inside,
          static_cast<uint32_t>(w.rows_per_head),
          static_cast<uint32_t>(plan.tiles_kv),
          static_cast<uint32_t>(problem.batch) * problem.heads_kv,
          divisor(plan.section),
          divisor(plan.section * plan.tiles_kv),
          divisor(problem.heads_kv),
          divisor(w.rows_per_head / kRowPadding),
          divisor(problem.heads_q),
          divisor(plan.round),
          plan.sections_turn,
          problem.heads_q / std::max(problem.heads_kv, 1)};
}

// The main kernel of the sm80 family.
int launch_sm80(const BackwardProblem& problem, const BackwardPlan& plan, BackwardParams params,
                CUstream_st* stream) {
  if (plan.grid == 0) return cudaSuccess;
  const bool bfloat16 = problem.data_type == DataType::kBFloat16;
  const void* kernel =
      find_kernel(problem.data_type, plan.head_dim, [&](auto head_dim, auto type) {
        return sm80::backward_kernel<head_dim(), type()>(plan.variant, plan.general);
      });
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  static_assert(4 * sm80::kBackwardTileCount <= 64);
  static SmemAllowance allowance;
  const int bit = 4 * plan.variant + 2 * bfloat16 + plan.general;
  if (int error = allowance.ask(kernel, bit, plan.smem_bytes)) return error;
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, dim3(plan.grid), dim3(plan.block), arguments, plan.smem_bytes,
                          stream);
}

}  // namespace

int launch_backward(const BackwardProblem& problem, const BackwardPlan& plan, void* workspace,
                    CUstream_st* stream) {
  if (plan.status != PlanStatus::kOk) return cudaErrorInvalidValue;
  char* base = static_cast<char*>(workspace);
  const bool hopper = plan.family == 90;
  BackwardProblem found = problem;
  if (!plan.otherwise.empty()) {
    if (int error = find_segment_intervals(&found, base + plan.workspace.segments, stream)) {
      return error;
    }
  }
  BackwardParams params = make_params(found, plan, base);
  void* arguments[] = {&params};
  // `early`: may begin, as far as it waits by itself, before the kernel before it has ended.
  const auto rows = [&](const void* kernel, int threads, bool early) {
    if (plan.rows_grid == 0) return cudaSuccess;
    if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(plan.rows_grid);
    config.blockDim = dim3(threads);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    return cudaLaunchKernelExC(&config, kernel, arguments);
  };

  if (int error =
          rows(prepare_rows_kernel(problem.data_type, plan.head_dim), kPrepareThreads, false)) {
    return error;
  }
  if (hopper) {
    if (int error = sm90::launch_backward(found, plan, params, stream)) return error;
  }
  for (const BackwardPlan& otherwise : plan.otherwise) {
    const BackwardParams same = make_params(found, otherwise, base);
    if (int error = launch_sm80(found, otherwise, same, stream)) return error;
  }
  if (!hopper) {
    if (int error = launch_sm80(found, plan, params, stream)) return error;
  }
  if (plan.finish_inside) return cudaSuccess;
  return rows(finish_rows_kernel(problem.data_type, plan.head_dim), kFinishThreads, hopper);
}

}  // namespace flash2
