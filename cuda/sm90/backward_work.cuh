// From the number of a key tile to what it is, and the order in which its query tiles are visited.
//
// Query tiles go from the last to the first, each for all query heads of the group. All key tiles
// of a head thus walk through the same Q and dO at about the same time, and the float32 sums of a
// query tile come together while they are in the L2 cache. It is the right order for the sums too:
// tiles are numbered so that one waits only for such as started before it. (Head after head, a key
// tile with a short walk would be ahead of the first one by the second head, and wait for it.
// Pairs, which wait for nobody, do go head after head.)
#pragma once

#include <cstdint>

#include "mask.cuh"
#include "params.h"
#include "problem.h"
#include "scheduler.cuh"

namespace flash2::sm90 {

// 128 keys of a key head, and what its query tiles are. Taken by whole warps.
template <int kTileQ>
struct KeyTile {
  static constexpr int kKeys = 128;
  int block;  // of 128 keys; -1: there are no more tiles
  int batch;
  int head_kv;
  float scale;
  int begin;  // query tiles [begin, end) of each head hold rows that see a key
  int end;
  int whole_begin;  // those whose rows see all keys; [whole_begin, whole_end) lies in [begin, end)
  int whole_end;
  int q_length;  // rows at or past it see nothing
  Visibility visibility;

  __device__ __forceinline__ KeyTile(const BackwardParams& params, uint32_t number, bool masked)
      : KeyTile(params, masked,
                SectionPlace(number, params.tiles_kv, params.heads, params.section,
                             params.section_tiles)) {}

  __device__ __forceinline__ int first_key() const { return block * kKeys; }
  __device__ __forceinline__ int steps() const { return end - begin; }
  // Rows of the last query tile at or past this, counted in it, hold what the call must not see.
  __device__ __forceinline__ int clear_rows(const Problem& p) const {
    return q_length < min(end * kTileQ, p.seq_q) ? q_length - (end - 1) * kTileQ : kTileQ;
  }
  // Likewise keys.
  __device__ __forceinline__ int clear_keys(const Problem& p) const {
    return visibility.kv_length < min(first_key() + kKeys, p.seq_kv)
               ? max(visibility.kv_length - first_key(), 0)
               : kKeys;
  }
  // The key blocks that visit a query tile before this one.
  __device__ __forceinline__ int visitors_before(const Problem& p, int tile_q) const {
    return block - visibility.row(p, tile_q * kTileQ).begin / kKeys;
  }

  // Query tiles whose rows see all of [first, last]; empty if a key is past kv_length.
  __device__ __forceinline__ Interval whole(const Problem& p, int first, int last) const {
    const Interval a = visibility.column(p, first, q_length);
    const Interval b = visibility.column(p, last, q_length);
    const int row_end = a.end >= q_length ? end * kTileQ : a.end;  // the rest is of no concern
    const int low = max((b.begin + kTileQ - 1) / kTileQ, begin), high = min(row_end / kTileQ, end);
    return last >= visibility.kv_length || high <= low ? Interval{begin, begin}
                                                       : Interval{low, high};
  }

 private:
  __device__ __forceinline__ KeyTile(const BackwardParams& params, bool masked,
                                     const SectionPlace& at)
      : block(at.turn),
        batch(params.heads_kv.divide(at.head)),
        head_kv(at.head - batch * params.problem.heads_kv),
        scale(params.problem.scale),
        visibility(params.problem, batch) {
    const BackwardProblem& p = params.problem;
    if (p.scale_operand.data) scale *= p.scale_operand.at(batch);
    q_length = p.seq_q;
    begin = whole_begin = 0;
    end = whole_end = (p.seq_q + kTileQ - 1) / kTileQ;
    if (masked) {
      if (p.query_seq_lengths.data) {
        q_length = max(0, min(q_length, p.query_seq_lengths.at(batch)));
      }
      const int first = first_key(), last = first + kKeys - 1;
      const Interval a = visibility.column(p, first, q_length);
      const Interval b = visibility.column(p, last, q_length);
      begin = a.begin / kTileQ;
      end = (b.end + kTileQ - 1) / kTileQ;
      if (first >= visibility.kv_length || a.begin >= b.end) end = begin = 0;
      const Interval all = whole(p, first, last);
      whole_begin = all.begin;
      whole_end = all.end;
    }
  }
};

}  // namespace flash2::sm90
