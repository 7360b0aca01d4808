// Before and after the backward's main kernel: backward_rows.h.

#include <cstdint>

#include "backward_rows.h"
#include "finish_rows.cuh"
#include "params.h"
#include "plan.h"
#include "problem.h"
#include "ptx/common.cuh"
#include "ptx/warpgroup.cuh"
#include "softmax.cuh"

namespace flash2 {
namespace {

// The rows of a block: kRowPadding of one batch entry and query head.
struct RowBlock {
  int batch;
  int head;
  int64_t row0;   // in the head
  int64_t row0w;  // in the workspace
  int q_length;   // rows at or past it have no gradient

  __device__ __forceinline__ RowBlock(const BackwardParams& params, uint32_t number) {
    const BackwardProblem& p = params.problem;
    const uint32_t head_of_all = params.row_blocks.divide(number);
    row0 = (number - head_of_all * params.row_blocks.value) * kRowPadding;
    row0w = int64_t{head_of_all} * params.rows_per_head + row0;
    batch = params.heads_q.divide(head_of_all);
    head = head_of_all - batch * p.heads_q;
    q_length = p.seq_q;
    if (p.query_seq_lengths.data) q_length = min(q_length, p.query_seq_lengths.at(batch));
  }
};

__device__ __forceinline__ const char* of_head(const void* array, const Strides& stride,
                                               const RowBlock& at) {
  return static_cast<const char*>(array) +
         2 * (at.batch * stride.batch + at.head * stride.head + at.row0 * stride.row);
}

template <DataType kType>
__device__ __forceinline__ float dot(const uint4& a, const uint4& b) {
  const uint32_t x[] = {a.x, a.y, a.z, a.w}, y[] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = ptx::unpack<kType>(x[i]), v = ptx::unpack<kType>(y[i]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}

template <int kHeadDim, DataType kType>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_rows(const __grid_constant__ BackwardParams params) {
  constexpr int kLanes = kHeadDim / 8, kPass = kPrepareThreads / kLanes;
  constexpr int kPasses = kRowPadding / kPass;
  const BackwardProblem& p = params.problem;
  const RowBlock at(params, blockIdx.x);
  ptx::launch_dependents();
  const int chunk = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  const char* out = of_head(p.out, p.out_stride, at) + chunk * 16;
  const char* dout = of_head(p.dout, p.dout_stride, at) + chunk * 16;

  uint4 o[kPasses], d[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int row = first + i * kPass;
    const bool inside = at.row0 + row < at.q_length && chunk * 8 < p.head_dim_v;
    o[i] = d[i] = uint4{0, 0, 0, 0};
    if (inside) {
      o[i] = *reinterpret_cast<const uint4*>(out + 2 * p.out_stride.row * row);
      d[i] = *reinterpret_cast<const uint4*>(dout + 2 * p.dout_stride.row * row);
    }
  }
  if (!params.first_stores) {
    float4* sums = reinterpret_cast<float4*>(params.dquery_sums + at.row0w * p.head_dim);
    const int words = kRowPadding * p.head_dim / 4;
    for (int i = threadIdx.x; i < words; i += kPrepareThreads) sums[i] = float4{0, 0, 0, 0};
  }
  if (params.turns && threadIdx.x < kRowPadding / 16) {
    params.turns[at.row0w / 16 + threadIdx.x] = 0;
  }
  if (threadIdx.x == 0 && at.row0 == 0) {
    params.finished[int64_t{at.batch} * p.heads_q + at.head] = 0;
    if (blockIdx.x == 0) params.ticket[0] = params.ticket[1] = 0;
  }
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    float delta = dot<kType>(o[i], d[i]);
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) delta += __shfl_xor_sync(~0u, delta, step);
    const int row = first + i * kPass;
    if (chunk != 0) continue;
    // A row without a key: its probabilities become exp2(x - inf) = 0.
    float lse2 = INFINITY;
    if (at.row0 + row < at.q_length) {
      const int64_t index = (int64_t{at.batch} * p.heads_q + at.head) * p.seq_q + at.row0 + row;
      const float lse = p.lse[index];
      if (lse != -INFINITY) lse2 = lse * kLog2E - kProbabilityExponent;
      if (p.dlse) delta -= p.dlse[index];
    }
    params.lse2[at.row0w + row] = lse2;
    params.delta[at.row0w + row] = lse2 == INFINITY ? 0.0f : delta * kProbabilityUnit;
  }
}

template <int kHeadDim, DataType kType>
__global__ void __launch_bounds__(kFinishThreads)
    finish_rows(const __grid_constant__ BackwardParams params) {
  constexpr int kWarpBytes = 16 * kFinishPitch<kHeadDim>;
  __shared__ __align__(16) char shared_memory[kRowPadding / 16 * kWarpBytes];
  ptx::wait_prerequisites();
  // From the last on: those sums are still in the L2 cache.
  const RowBlock at(params, gridDim.x - 1 - blockIdx.x);
  const int strip = threadIdx.x / 32;
  static_assert(32 * kRowPadding / 16 == kFinishThreads);
  finish_strip<kHeadDim, kType>(params, at.batch, at.head, static_cast<int>(at.row0) + 16 * strip,
                                ptx::shared_address(shared_memory) + strip * kWarpBytes);
}

template <int kHeadDim>
const void* find(DataType type, bool prepare) {
  const bool bfloat16 = type == DataType::kBFloat16;
  if (prepare) {
    return bfloat16 ? reinterpret_cast<const void*>(&prepare_rows<kHeadDim, DataType::kBFloat16>)
                    : reinterpret_cast<const void*>(&prepare_rows<kHeadDim, DataType::kFloat16>);
  }
  return bfloat16 ? reinterpret_cast<const void*>(&finish_rows<kHeadDim, DataType::kBFloat16>)
                  : reinterpret_cast<const void*>(&finish_rows<kHeadDim, DataType::kFloat16>);
}

const void* find(DataType type, int head_dim, bool prepare) {
  switch (head_dim) {
    case 64:
      return find<64>(type, prepare);
    case 128:
      return find<128>(type, prepare);
    case 256:
      return find<256>(type, prepare);
  }
  return nullptr;
}

}  // namespace

const void* prepare_rows_kernel(DataType type, int head_dim) { return find(type, head_dim, true); }
const void* finish_rows_kernel(DataType type, int head_dim) { return find(type, head_dim, false); }

}  // namespace flash2
