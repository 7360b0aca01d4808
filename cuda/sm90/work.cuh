// What a forward block knows of its present tile.
#pragma once

#include <cstdint>

#include "mask.cuh"
#include "params.h"
#include "scheduler.cuh"
#include "sm90/tiles.h"

namespace flash2::sm90 {

template <int kTile>
struct Work {
  static constexpr ForwardTile kT = kForwardTiles[kTile];
  int batch;
  int head;
  int head_kv;
  int row0;
  int q_length;  // rows at or past it see nothing
  int steps;     // blocks of keys; at least one, so that all tiles look alike to the pipeline
  int masked;    // steps before those whose blocks every row sees whole
  int kv_length;

  __device__ __forceinline__ Work(const ForwardParams& params, uint32_t tile) {
    const ForwardProblem& p = params.problem;
    const ForwardWork<kT.tile_q(), kT.tile_kv> found(params, tile);
    batch = found.batch;
    head = found.head;
    head_kv = params.group.divide(head);
    row0 = found.row0;
    if constexpr (kT.masked) {
      q_length = found.q_length;
      kv_length = found.visibility.kv_length;
      upper_ = found.range.upper;
      top_ = found.range.top;
      whole_bottom_ = found.range.whole_bottom;
      whole_top_ = found.range.whole_top;
      masked = found.range.masked();
      steps = found.range.total;
      if (steps == 0) {  // a block past the array: zeros, which no row sees
        steps = masked = upper_ = 1;
        top_ = p.seq_kv / kT.tile_kv + 2;
      }
    } else {
      q_length = p.seq_q;
      kv_length = p.seq_kv;
      steps = top_ = (p.seq_kv + kT.tile_kv - 1) / kT.tile_kv;
      masked = p.seq_kv % kT.tile_kv != 0 ? 1 : 0;
    }
  }

  __device__ __forceinline__ int first_key(int step) const {
    int block = top_ - 1 - step;
    if constexpr (kT.masked) {
      if (step >= masked) {
        block = whole_top_ - 1 - (step - masked);
      } else if (step >= upper_) {
        block = whole_bottom_ - 1 - (step - upper_);
      }
    }
    return block * kT.tile_kv;
  }

 private:
  int top_;
  int upper_, whole_bottom_, whole_top_;  // of BlockRange, where masked
};

}  // namespace flash2::sm90
