// dQ from its float32 sums.
#pragma once

#include <cstdint>

#include "dquery_sums.cuh"
#include "mask.cuh"
#include "params.h"
#include "problem.h"
#include "ptx/common.cuh"

namespace flash2 {

// The strip of 16 rows from `row0` on, by one warp, through 16 * kFinishPitch bytes of shared
// memory: sums come in the order of accumulators.
template <int kHeadDim>
inline constexpr int kFinishPitch = kHeadDim * 2 + 16;

// To shared memory from sums that lie transposed, times `scale`.
template <int kHeadDim, DataType kType>
__device__ __forceinline__ void turn_strip(const TransposedSums& sums, int row0, float scale,
                                           uint32_t shared) {
  constexpr int kPitch = kFinishPitch<kHeadDim>;
  const int lane = threadIdx.x % 32;
  float4 v[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = sums.load(row0 + i % 2 * 8, i / 2, lane);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int row = i % 2 * 8 + lane % 4 * 2, column = i / 2 * 16 + lane / 4;
    const uint32_t place = shared + row * kPitch + column * 2;
    const uint32_t left = ptx::pack<kType>(v[i].x * scale, v[i].y * scale);
    const uint32_t right = ptx::pack<kType>(v[i].z * scale, v[i].w * scale);
    ptx::store_shared_2(place, left);
    ptx::store_shared_2(place + kPitch, left >> 16);
    ptx::store_shared_2(place + 16, right);
    ptx::store_shared_2(place + kPitch + 16, right >> 16);
  }
}

template <int kHeadDim, DataType kType>
__device__ __forceinline__ void finish_strip(const BackwardParams& params, int batch, int head,
                                             int row0, uint32_t shared) {
  constexpr int kPitch = kFinishPitch<kHeadDim>, kLanes = kHeadDim / 8;
  // Blocks of 8 columns whose sums are in flight together.
  constexpr int kTogether = kHeadDim / 8 < 16 ? kHeadDim / 8 : 16;
  const BackwardProblem& p = params.problem;
  const int lane = threadIdx.x % 32;
  const int64_t head_of_all = int64_t{batch} * p.heads_q + head;
  float* sums = params.dquery_sums + (head_of_all * params.rows_per_head + row0) * p.head_dim;
  float scale = p.scale;
  if (p.scale_operand.data) scale *= p.scale_operand.at(batch);
  const uint32_t place = shared + lane / 4 * kPitch + lane % 4 * 4;
  const auto rows_of = [&](const void* array, const Strides& stride) {
    return static_cast<const char*>(array) +
           2 * (batch * stride.batch + head * stride.head + row0 * stride.row);
  };
  const char* query = rows_of(p.query, p.query_stride);
  // Sums that nobody has stored stand for zeros.
  bool stored = true;
  if (params.first_stores) {
    int q_length = p.seq_q;
    if (p.query_seq_lengths.data) q_length = min(q_length, p.query_seq_lengths.at(batch));
    const int last = min(row0 + 16, q_length) - 1;
    stored = BlockRange<128>(p, Visibility(p, batch), row0, last).total > 0;
  }
  float dscale[2] = {0.0f, 0.0f};
  bool transposed = false;
  if constexpr (kHeadDim == TransposedSums::kColumns) {
    transposed = params.transposed_sums;
    if (transposed) {
      const float* all = params.dquery_sums + head_of_all * params.rows_per_head * p.head_dim;
      turn_strip<kHeadDim, kType>(TransposedSums{all}, row0, scale, shared);
    }
  }
#pragma unroll 1
  for (int first = 0; !transposed && first < p.head_dim / 8; first += kTogether) {
    float4 v[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      v[i] = float4{0, 0, 0, 0};
      if (stored && first + i < p.head_dim / 8)
        v[i] = DquerySums{sums + (first + i) * 128}.load(lane);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const uint32_t target = place + (first + i) * 16;
      ptx::store_shared(target, ptx::pack<kType>(v[i].x * scale, v[i].y * scale));
      ptx::store_shared(target + 8 * kPitch, ptx::pack<kType>(v[i].z * scale, v[i].w * scale));
    }
    if (p.dscale_rows) {  // q . (dS K)
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        for (int half = 0; half < 2; ++half) {
          const int row = lane / 4 + 8 * half;
          const float2 sum = half == 0 ? float2{v[i].x, v[i].y} : float2{v[i].z, v[i].w};
          // Rows past the length have no sum, but may hold anything.
          if (first + i < p.head_dim / 8 && row0 + row < p.seq_q &&
              (sum.x != 0.0f || sum.y != 0.0f)) {
            const float2 q = ptx::unpack<kType>(*reinterpret_cast<const uint32_t*>(
                query + 2 * p.query_stride.row * row + (first + i) * 16 + lane % 4 * 4));
            dscale[half] += q.x * sum.x + q.y * sum.y;
          }
        }
      }
    }
  }
  __syncwarp();
  char* dquery = const_cast<char*>(rows_of(p.dquery, p.dquery_stride));
#pragma unroll
  for (int i = 0; i < 16 * kLanes / 32; ++i) {
    const int row = (i * 32 + lane) / kLanes, chunk = lane % kLanes;
    const uint4 words = ptx::load_shared_16(shared + row * kPitch + chunk * 16);
    if (row0 + row < p.seq_q && chunk * 8 < p.head_dim) {
      *reinterpret_cast<uint4*>(dquery + 2 * p.dquery_stride.row * row + chunk * 16) = words;
    }
  }
  __syncwarp();
  if (p.dscale_rows) {
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      dscale[half] += __shfl_xor_sync(~0u, dscale[half], 1);
      dscale[half] += __shfl_xor_sync(~0u, dscale[half], 2);
      if (lane % 4 == 0 && row < p.seq_q)
        p.dscale_rows[head_of_all * p.seq_q + row] = dscale[half];
    }
  }
}

}  // namespace flash2
