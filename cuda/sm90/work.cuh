// What a forward block knows of a tile: found by the scheduler, read by all others from shared
// memory, since to find it takes a hundred dependent instructions and loads of the operands.
#pragma once

#include <cstdint>

#include "mask.cuh"
#include "params.h"
#include "ptx/common.cuh"
#include "scheduler.cuh"
#include "sm90/kernels.h"
#include "sm90/tiles.h"

namespace flash2::sm90 {

struct Work {
  static constexpr int kBytes = 80;

  int exists;  // 0: there are no more tiles
  int batch;
  int head;  // the first of the pack
  int head_kv;
  int row0;      // the first position
  int q_length;  // rows at or past it see nothing
  float scale;
  int steps;   // blocks of keys; at least one, so that all tiles look alike to the pipeline
  int masked;  // steps before those whose blocks every row sees whole
  int upper;   // as in BlockRange
  int top;
  int whole_bottom;
  int whole_top;
  RowBounds bounds;
  int first;  // key of step 0

  template <int kTile>
  static __device__ __forceinline__ Work find(const ForwardParams& params,
                                              const ForwardSchedule& schedule, uint32_t tile) {
    constexpr ForwardTile kT = kForwardTiles[kTile];
    const ForwardProblem& p = params.problem;
    Work work{};
    if (tile >= schedule.tiles) return work;
    const int shift = kT.packs() ? schedule.pack_shift : 0;
    const ForwardWork<kT.tile_q(), kT.tile_kv> found(params, tile, kT.tile_q() >> shift);
    work.exists = 1;
    work.batch = found.batch;
    work.head = found.head;
    work.head_kv = params.group.divide(found.head);
    if (kT.packs()) {
      const int pack = found.head - work.head_kv * params.group.value;  // of the group's
      work.head = work.head_kv * schedule.group + (pack << shift);
    }
    work.row0 = found.row0;
    work.q_length = found.q_length;
    work.scale = p.scale;
    if (p.scale_operand.data) work.scale *= p.scale_operand.at(found.batch);
    if constexpr (kT.masked) work.bounds = RowBounds(p, found.visibility);
    BlockRange<kT.tile_kv> range = found.range;
    if constexpr (kT.masked) {
      const int last = min(found.row0 + (kT.tile_q() >> shift), found.q_length) - 1;
      if (p.row_keys && found.row0 <= last) {
        const auto seen = [&](int row) {
          return meet(found.visibility.row(p, row), segment_keys_of(p, found.batch, row));
        };
        range = BlockRange<kT.tile_kv>(seen(found.row0), seen(last), true);
      }
    }
    work.steps = range.total;
    work.masked = range.masked();
    work.upper = range.upper;
    work.top = range.top;
    work.whole_bottom = range.whole_bottom;
    work.whole_top = range.whole_top;
    if constexpr (kT.joins) {  // this block's share of the steps
      const int rank = blockIdx.x % schedule.splits;
      const int begin = work.steps * rank / schedule.splits;
      work.steps = work.steps * (rank + 1) / schedule.splits - begin;
      work.masked = min(work.masked - begin, work.steps);
      work.upper -= begin;
      work.top -= begin;
    }
    if (work.steps == 0) {  // a block past the array: zeros, which no row sees
      work.steps = work.masked = work.upper = 1;
      work.top = p.seq_kv / kT.tile_kv + 2;
    }
    work.first = work.first_key<kT.tile_kv>(0);
    return work;
  }

  template <int kTileKv>
  __device__ __forceinline__ int first_key(int step) const {
    int block = whole_top - 1 - (step - masked);
    if (step < masked) block = whole_bottom - 1 - (step - upper);
    if (step < upper) block = top - 1 - step;
    return block * kTileKv;
  }

  __device__ __forceinline__ void store(uint32_t address) const {
    const auto put = [&](int i, int a, int b, int c, int d) {
      const auto word = [](int x) { return static_cast<uint32_t>(x); };
      ptx::store_shared_16(address + 16 * i, uint4{word(a), word(b), word(c), word(d)});
    };
    put(0, exists, batch, head, steps);
    put(1, row0, q_length, __float_as_int(scale), first);
    put(2, masked, upper, top, whole_bottom);
    put(3, whole_top, head_kv, bounds.kv_length, bounds.offset);
    put(4, bounds.left, bounds.right, bounds.diagonal, bounds.prefix);
  }

  static __device__ __forceinline__ Work load(uint32_t address) {
    const uint4 a = ptx::load_shared_16(address), b = ptx::load_shared_16(address + 16),
                c = ptx::load_shared_16(address + 32), d = ptx::load_shared_16(address + 48),
                e = ptx::load_shared_16(address + 64);
    // What rules loops and branches, uniform for the compiler too.
    const auto same = [](uint32_t x) { return static_cast<int>(__shfl_sync(~0u, x, 0)); };
    Work work;
    work.exists = same(a.x);
    work.batch = a.y;
    work.head = a.z;
    work.steps = same(a.w);
    work.row0 = b.x;
    work.q_length = b.y;
    work.scale = __uint_as_float(b.z);
    work.first = same(b.w);
    work.masked = same(c.x);
    work.upper = same(c.y);
    work.top = same(c.z);
    work.whole_bottom = same(c.w);
    work.whole_top = same(d.x);
    work.head_kv = d.y;
    work.bounds.kv_length = d.z;
    work.bounds.offset = d.w;
    work.bounds.left = e.x;
    work.bounds.right = e.y;
    work.bounds.diagonal = e.z;
    work.bounds.prefix = e.w;
    return work;
  }
};

}  // namespace flash2::sm90
