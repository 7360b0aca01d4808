// dQ from its float32 sums, by a warp of the backward's block that has nothing else to do.
//
// A query tile's sums are complete when the last of its key tiles has added, and whoever that is
// knows it from the tile's flag, which counts them. Its block makes dQ right then, while the sums
// are in the L2 cache: a kernel afterwards would read them from memory, which at short lengths is
// a sixth of the time.
#pragma once

#include <cstdint>

#include "params.h"
#include "ptx/common.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "sm90/backward_kernels.h"
#include "sm90/backward_memory.cuh"
#include "sm90/backward_scores.cuh"
#include "sm90/output.cuh"

namespace flash2::sm90 {

// What a storer leaves for the finisher: a query tile's number in the workspace.
struct BackwardPost {
  static constexpr uint32_t kNoMore = ~0u;
};

template <int kTile, DataType kType>
struct BackwardFinisher {
  static constexpr BackwardTile kT = kBackwardTiles[kTile];
  static constexpr int kD = kT.head_dim, kQ = kT.tile_q;
  using Memory = BackwardMemory<kTile>;

  const BackwardMaps& maps;
  const BackwardParams& params;
  Memory smem;

  // By a whole warp.
  __device__ __forceinline__ void run() const {
    const int lane = threadIdx.x % 32;
    uint32_t posts[2] = {0, 0};  // taken so far
    uint32_t parity = 0;
#pragma unroll 1
    for (int storers = 2; storers > 0;) {
#pragma unroll
      for (int storer = 0; storer < 2; ++storer) {
        const uint32_t place = posts[storer] % Memory::kPosts;
        const uint32_t full = smem.post_full(storer, place);
        const uint32_t full_parity = posts[storer] / Memory::kPosts & 1;
        if (!uniform(ptx::mbarrier_test(full, full_parity))) continue;
        ptx::mbarrier_wait_warp(full, full_parity);
        const uint32_t post = uniform(ptx::load_shared(smem.post(storer, place)));
        if (lane == 0) ptx::mbarrier_arrive(smem.post_empty(storer, place));
        ++posts[storer];
        if (post == BackwardPost::kNoMore) {
          --storers;
        } else {
          finish(post, parity, lane);
          parity ^= 1;
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void finish(uint32_t number, uint32_t parity, int lane) const {
    const BackwardProblem& p = params.problem;
    if (lane == 0) {
      ptx::fence_async_global();
      ptx::mbarrier_arrive_expect(smem.sums_full(), 4 * kQ * kD);
      ptx::tma_load_rows(smem.sums(), &maps.sums, smem.sums_full(), 0, number * (kQ * kD / 256));
    }
    __syncwarp();
    const int head_of_all = params.row_blocks.divide(number * (kQ / kRowPadding));
    const int batch = params.heads_q.divide(head_of_all);
    const int head = head_of_all - batch * p.heads_q;
    const int rows = params.row_blocks.value * kRowPadding;  // of a head
    int row = static_cast<int>(int64_t{number} * kQ - int64_t{head_of_all} * rows) + lane / 4;
    char* target = static_cast<char*>(p.dquery) +
                   2 * (batch * p.dquery_stride.batch + head * p.dquery_stride.head +
                        row * p.dquery_stride.row + 8 * (lane % 4));
    float scale = p.scale;
    if (p.scale_operand.data) scale *= p.scale_operand.at(batch);
    ptx::mbarrier_wait(smem.sums_full(), parity);
    uint32_t from = smem.sums() + lane * 16;
#pragma unroll 1
    for (int half = 0; half < kQ / 8; ++half) {  // of a strip of 16 rows
#pragma unroll 1
      for (int column = 0; column < kD; column += 32) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 sum = ptx::load_shared_8(from + column * 64 + i * 512);
          words[i] = ptx::pack<kType>(sum.x * scale, sum.y * scale);
        }
        transpose_quad(words);
        if (row < p.seq_q) {
          *reinterpret_cast<uint4*>(target + 2 * column) =
              uint4{words[0], words[1], words[2], words[3]};
        }
      }
      row += 8;
      target += 16 * p.dquery_stride.row;
      from += half % 2 == 0 ? 8 : kD * 64 - 8;
    }
    __syncwarp();  // before the next sums overwrite these
  }
};

}  // namespace flash2::sm90
