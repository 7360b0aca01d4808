// Where the blocks of a cluster share the keys of a tile: from what each has computed to the
// output.
//
// Every block leaves its unnormalised output, maxima and sums in its shared memory. Then each
// makes some rows of the result, of everyone's parts in the order of the blocks, so that all runs
// give the same bytes.
#pragma once

#include <cstdint>

#include "problem.h"
#include "ptx/cluster.cuh"
#include "ptx/common.cuh"
#include "sm90/kernels.h"
#include "sm90/output.cuh"
#include "sm90/tiles.h"
#include "sm90/work.cuh"
#include "softmax.cuh"

namespace flash2::sm90 {

template <int kTile, DataType kType>
struct Join {
  static constexpr ForwardTile kT = kForwardTiles[kTile];
  static constexpr int kD = kT.head_dim, kRows = kT.tile_q(), kThreads = 128 * kT.consumers;
  static constexpr uint32_t kRowBytes = 4 * kD + 16;  // neighbouring rows begin in other banks
  static constexpr uint32_t kRowState = kRows * kRowBytes;
  static_assert(kRowState + 8 * kRows <= 2 * kT.stages() * kT.kv_bytes());

  const ForwardProblem& p;
  const ForwardSchedule& schedule;
  uint32_t area;  // the stages of K and V, which nobody reads any more
  int thread;     // of all consumers'

  // Rows `row` and row + 8 of the tile, as a thread holds them.
  __device__ __forceinline__ void leave(int row, const float (&o)[kD / 2],
                                        const OnlineSoftmax<2>& softmax) const {
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t target = area + (row + 8 * r) * kRowBytes + 8 * quad;
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
        ptx::store_shared_8(target + 32 * j, o[4 * j + 2 * r], o[4 * j + 2 * r + 1]);
      }
      float sum = softmax.sum[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (quad == 0) {
        ptx::store_shared_8(area + kRowState + 8 * (row + 8 * r), softmax.max[r], sum);
      }
    }
  }

  // After all blocks have left their parts. Eight columns of a row at a time.
  __device__ __forceinline__ void make(const Work& work, float factor) const {
    constexpr int kParts = kD / 8;
    const int positions = min(kRows >> schedule.pack_shift, p.seq_q - work.row0);
    const int parts = (positions << schedule.pack_shift) * kParts;
    const int first = static_cast<int>(ptx::cluster_rank()) * kThreads + thread;
    for (int i = first; i - static_cast<int>(threadIdx.x % 32) < parts;
         i += kThreads * schedule.splits) {
      make_part(work, factor, min(i, parts - 1) / kParts, i % kParts, i < parts);
    }
  }

 private:
  __device__ __forceinline__ void make_part(const Work& work, float factor, int row, int part,
                                            bool wanted) const {
    float top = -INFINITY;
    for (int rank = 0; rank < schedule.splits; ++rank) top = fmaxf(top, state(rank, row).x);
    const float base = OnlineSoftmax<1>::base_of(top, factor);
    float total = 0.0f, o[8] = {};
    for (int rank = 0; rank < schedule.splits; ++rank) {
      const float2 found = state(rank, row);
      const float weight = ptx::exp2(OnlineSoftmax<1>::base_of(found.x, factor) - base);
      total = fmaf(found.y, weight, total);
      const uint32_t source = ptx::peer_address(area + row * kRowBytes + 32 * part, rank);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 x = ptx::load_peer_16(source + 16 * half);
        o[4 * half] = fmaf(x.x, weight, o[4 * half]);
        o[4 * half + 1] = fmaf(x.y, weight, o[4 * half + 1]);
        o[4 * half + 2] = fmaf(x.z, weight, o[4 * half + 2]);
        o[4 * half + 3] = fmaf(x.w, weight, o[4 * half + 3]);
      }
    }
    // `finish` adds up the sums of a quad, whose lanes are all at this row.
    OnlineSoftmax<1> joined;
    joined.max[0] = top;
    joined.sum[0] = threadIdx.x % 4 == 0 ? total : 0.0f;
    const RowPlace<true> place(schedule, work, row);
    const bool exists = place.exists(p), has_sink = p.sinks.data != nullptr;
    float sink = has_sink && exists ? p.sinks.at(work.batch, place.head) : 0.0f;
    if constexpr (kT.capped) sink += p.soft_cap;  // as scores: RowScores::cap
    float lse;
    const float norm =
        joined.finish(0, place.position < work.q_length, factor, has_sink, sink, &lse);
    if constexpr (kT.capped) lse -= p.soft_cap;
    if (!wanted || !exists) return;
    if (part == 0 && p.lse != nullptr) {
      p.lse[(int64_t{work.batch} * p.heads_q + place.head) * p.seq_q + place.position] = lse;
    }
    if (8 * part >= p.head_dim_v) return;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool empty = norm == 0.0f;  // whatever o holds
      words[i] =
          ptx::pack<kType>(empty ? 0.0f : o[2 * i] * norm, empty ? 0.0f : o[2 * i + 1] * norm);
    }
    char* target = static_cast<char*>(p.out) +
                   2 * (work.batch * p.out_stride.batch + place.head * p.out_stride.head +
                        place.position * p.out_stride.row + 8 * part);
    *reinterpret_cast<uint4*>(target) = uint4{words[0], words[1], words[2], words[3]};
  }

  // A block's maximum and sum of a row.
  __device__ __forceinline__ float2 state(int rank, int row) const {
    return ptx::load_peer_8(ptx::peer_address(area + kRowState + 8 * row, rank));
  }
};

}  // namespace flash2::sm90
