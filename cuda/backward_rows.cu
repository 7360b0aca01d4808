// Before and after the backward's main kernel: backward_rows.h.

#include <cstdint>

#include "backward_rows.h"
#include "dquery_sums.cuh"
#include "mask.cuh"
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
__global__ void __launch_bounds__(kRowsThreads)
    prepare_rows(const __grid_constant__ BackwardParams params) {
  constexpr int kLanes = kHeadDim / 8, kPass = kRowsThreads / kLanes;
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
    for (int i = threadIdx.x; i < words; i += kRowsThreads) sums[i] = float4{0, 0, 0, 0};
  }
  if (params.turns) {
    if (threadIdx.x < kRowPadding / 16) params.turns[at.row0w / 16 + threadIdx.x] = 0;
    if (blockIdx.x == 0 && threadIdx.x == 0) *params.ticket = 0;
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

// A warp makes a strip of 16 rows, through shared memory: sums come in the order of accumulators.
template <int kHeadDim, DataType kType>
__global__ void __launch_bounds__(kRowsThreads)
    finish_rows(const __grid_constant__ BackwardParams params) {
  constexpr int kLanes = kHeadDim / 8, kPitch = kHeadDim * 2 + 16;
  constexpr int kStrips = kRowPadding / 16, kShare = kRowsThreads / 32 / kStrips;
  constexpr int kBlocks = kHeadDim / 8 / kShare;
  __shared__ __align__(16) char shared_memory[kRowPadding * kPitch];
  const BackwardProblem& p = params.problem;
  ptx::wait_prerequisites();
  // From the last on: those sums are still in the L2 cache.
  const RowBlock at(params, gridDim.x - 1 - blockIdx.x);
  const int lane = threadIdx.x % 32, strip = threadIdx.x / 32 % kStrips;
  const int part = threadIdx.x / 32 / kStrips;
  const uint32_t shared =
      ptx::shared_address(shared_memory) + (strip * 16 + lane / 4) * kPitch + lane % 4 * 4;
  const float* sums = params.dquery_sums + (at.row0w + strip * 16) * p.head_dim;
  float scale = p.scale;
  if (p.scale_operand.data) scale *= p.scale_operand.at(at.batch);

  // Sums that nobody has stored stand for zeros.
  const int row0 = static_cast<int>(at.row0);
  const int last = min(row0 + static_cast<int>(kRowPadding), at.q_length) - 1;
  const bool visited =
      !params.first_stores || BlockRange<128>(p, Visibility(p, at.batch), row0, last).total > 0;
  const int columns = visited ? p.head_dim : 0;

  float4 v[kBlocks];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const int j = i * kShare + part;
    v[i] = float4{0, 0, 0, 0};
    if (j * 8 < columns) v[i] = DquerySums{const_cast<float*>(sums) + j * 128}.load(lane);
  }
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const uint32_t target = shared + (i * kShare + part) * 16;
    ptx::store_shared(target, ptx::pack<kType>(v[i].x * scale, v[i].y * scale));
    ptx::store_shared(target + 8 * kPitch, ptx::pack<kType>(v[i].z * scale, v[i].w * scale));
  }
  __syncthreads();
  char* dquery = const_cast<char*>(of_head(p.dquery, p.dquery_stride, at));
  for (int i = threadIdx.x; i < kRowPadding * kLanes; i += kRowsThreads) {
    const int row = i / kLanes, chunk = i % kLanes;
    if (at.row0 + row < p.seq_q && chunk * 8 < p.head_dim) {
      *reinterpret_cast<uint4*>(dquery + 2 * p.dquery_stride.row * row + chunk * 16) =
          *reinterpret_cast<const uint4*>(shared_memory + row * kPitch + chunk * 16);
    }
  }

  if (p.dscale_rows) {  // q . (dS K), from the float32 sums
    const char* query = of_head(p.query, p.query_stride, at);
    for (int half = 0; half < 2; ++half) {
      const int row = strip * 16 + lane / 4 + 8 * half;
      if (part != 0) break;
      float sum = 0.0f;
      for (int j = 0; j < columns / 8; ++j) {
        const float4 x = DquerySums{const_cast<float*>(sums) + j * 128}.load(lane);
        if (at.row0 + row < at.q_length) {
          const float2 q = ptx::unpack<kType>(*reinterpret_cast<const uint32_t*>(
              query + 2 * p.query_stride.row * row + j * 16 + lane % 4 * 4));
          sum += half == 0 ? q.x * x.x + q.y * x.y : q.x * x.z + q.y * x.w;
        }
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 0 && at.row0 + row < p.seq_q) {
        p.dscale_rows[(int64_t{at.batch} * p.heads_q + at.head) * p.seq_q + at.row0 + row] = sum;
      }
    }
  }
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
