// dQ from its float32 sums, by a warp of the backward's block that has nothing else to do.
//
// The storers count, for each key head, the key tiles whose sums have all arrived. Query tiles are
// taken from a counter, in the order in which heads are worked on; whoever takes one waits until
// its head is complete and makes its dQ, while the sums are in the L2 cache. A kernel afterwards
// would read them from memory. Nobody waits for a finisher, so it may wait for whom it likes.
#pragma once

#include <cstdint>

#include "params.h"
#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/backward_kernels.h"
#include "sm90/backward_memory.cuh"
#include "sm90/backward_scores.cuh"

namespace flash2::sm90 {

// A whole warp; its first lane takes numbers and starts the copies.
template <int kTile, DataType kType>
struct BackwardFinisher {
  static constexpr BackwardTile kT = kBackwardTiles[kTile];
  static constexpr int kD = kT.head_dim, kQ = kT.tile_q;

  const BackwardMaps& maps;
  const BackwardParams& params;
  BackwardMemory<kTile> smem;

  __device__ __forceinline__ void run() const {
    const uint32_t tiles = params.row_blocks.value * kRowPadding / kQ;  // of a head
    const uint32_t count = params.problem.batch * params.problem.heads_q * tiles;
    const bool leader = threadIdx.x % 32 == 0;
    ptx::wait_prerequisites();
    uint32_t number = 0;
    for (uint32_t parity = 0;;) {
      if (leader) number = atomicAdd(params.ticket + 1, 1);
      number = uniform(number);
      if (number >= count) break;
      const int head = params.row_blocks.divide(number * (kQ / kRowPadding));  // of all
      const int row0 = static_cast<int>(number - head * tiles) * kQ;
      if (row0 >= params.problem.seq_q) continue;
      if (leader) {
        const int group = params.problem.heads_q / params.problem.heads_kv;
        const int complete = 2 * static_cast<int>(params.tiles_kv);  // of two storers
        while (ptx::load_acquire(params.finished + head / group) < complete) {
        }
        ptx::fence_async_global();
        ptx::mbarrier_arrive_expect(smem.sums_full(), 4 * kQ * kD);
        ptx::tma_load_rows(smem.sums(), &maps.sums, smem.sums_full(), 0, number * (kQ * kD / 256));
      }
      __syncwarp();
      ptx::mbarrier_wait_warp(smem.sums_full(), parity);
      parity ^= 1;
      finish(head, row0);
      __syncwarp();  // before the next sums overwrite these
    }
  }

 private:
  // A query tile's dQ, whose sums lie in shared memory in the order of the accumulators.
  __device__ __forceinline__ void finish(int head_of_all, int row0) const {
    const BackwardProblem& p = params.problem;
    const int lane = threadIdx.x % 32;
    const int batch = params.heads_q.divide(head_of_all);
    const int head = head_of_all - batch * p.heads_q;
    int row = row0 + lane / 4;
    const int64_t stride = 2 * p.dquery_stride.row;
    char* target = static_cast<char*>(p.dquery) +
                   2 * (batch * p.dquery_stride.batch + head * p.dquery_stride.head) +
                   row * stride + lane % 4 * 4;
    float scale = p.scale;
    if (p.scale_operand.data) scale *= p.scale_operand.at(batch);
    uint32_t from = smem.sums() + lane * 16;
#pragma unroll 1
    for (int block = 0; block < kQ * kD / 128; block += 4) {  // of 16 rows and 8 columns
      uint4 v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = ptx::load_shared_16(from + i * 512);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto times = [&](uint32_t x) { return __uint_as_float(x) * scale; };
        const uint32_t above = ptx::pack<kType>(times(v[i].x), times(v[i].y));
        const uint32_t below = ptx::pack<kType>(times(v[i].z), times(v[i].w));
        if (row < p.seq_q) *reinterpret_cast<uint32_t*>(target + 16 * i) = above;
        if (row + 8 < p.seq_q) *reinterpret_cast<uint32_t*>(target + 8 * stride + 16 * i) = below;
      }
      from += 4 * 512;
      target += 64;
      if ((block + 4) % (kD / 8) == 0) {
        row += 16;
        target += 16 * stride - 2 * kD;
      }
    }
  }
};

}  // namespace flash2::sm90
