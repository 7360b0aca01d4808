// From the number of a key tile to what it is, and the order in which its query tiles are visited.
//
// Query tiles go from the last to the first, each for all query heads of the group. All key tiles
// of a head thus walk through the same Q and dO at about the same time, and the float32 sums of a
// query tile come together while they are in the L2 cache. (Head after head, key tiles with short
// walks would be ahead of the first one by the second head.)
//
// Under a causal mask that holds for tiles that begin together: the first round of a section, as
// many tiles as are at work at once. Those of the second begin one by one as the first ones end,
// the shortest first, and take the longest of what is left, so they all end together: they go from
// the first query tile, at the diagonal, to the last, and thereby meet. So on in turn, where the
// plan wants it (BackwardPlan::round), in each section anew or, where a section is one round, from
// section to section.
//
// A tile waits for the sums of such alone as have a smaller number, hence started before it, or
// for a store that is under way: the order of its own walk is free. Short walks without a mask use
// that to begin each at a query tile of its own, and go around (BackwardTile::around).
#pragma once

#include <cstdint>

#include "mask.cuh"
#include "params.h"
#include "problem.h"
#include "ptx/mbarrier.cuh"
#include "scheduler.cuh"
#include "sm90/backward_tiles.h"
#include "sm90/ring.cuh"

namespace flash2::sm90 {

// 128 keys of a key head, and what its query tiles are. Taken by whole warps.
template <int kTile>
struct KeyTile {
  static constexpr BackwardTile kT = kBackwardTiles[kTile];
  static constexpr bool kMasked = kT.masked;
  // Whether there may be segments: then nobody waits for a turn.
  static constexpr bool kSegments = kMasked && !kT.deterministic && !kT.turns;
  static constexpr int kKeys = 128, kTileQ = kT.tile_q;
  int block;  // of 128 keys; -1: there are no more tiles
  int batch;
  int head_kv;
  float scale;
  int begin;  // query tiles [begin, end) of each head hold rows that see a key
  int end;
  int whole_begin;  // those whose rows see all keys; [whole_begin, whole_end) lies in [begin, end)
  int whole_end;
  int q_length;  // rows at or past it see nothing
  bool upward;   // walks from the first query tile to the last
  Visibility visibility;

  __device__ __forceinline__ KeyTile(const BackwardParams& params, uint32_t number)
      : KeyTile(params, number,
                SectionPlace(number, params.tiles_kv, params.heads, params.section,
                             params.section_tiles)) {}

  __device__ __forceinline__ int first_key() const { return block * kKeys; }
  __device__ __forceinline__ int steps() const { return end - begin; }
  // Where its walk begins, and where it goes from there.
  __device__ __forceinline__ int first_query(const BackwardParams& params) const {
    if (kT.around) {
      const int tiles = static_cast<int>(params.tiles_kv), group = params.group;
      // Tiles of a group, of which each begins with a head of its own, stay near to each other:
      // no cache holds Q, dO and sums of all heads of so many.
      return end - 1 - (group == 1 ? block * end / tiles : block / group % end);
    }
    return kMasked && upward ? begin : end - 1;
  }
  __device__ __forceinline__ int direction() const { return kMasked && upward ? 1 : -1; }
  __device__ __forceinline__ int next_query(int query_tile) const {
    if (kT.around && query_tile == 0) return end - 1;
    return query_tile + direction();
  }
  // The head of the group that comes first at each query tile. Where nobody waits for a fixed
  // first tile, those that are in step had better not all add to the same sums.
  __device__ __forceinline__ int first_of_group(const BackwardParams& params) const {
    return params.first_stores && !kT.around ? 0 : block % params.group;
  }
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
  // The query rows that see a key below kv_length.
  __device__ __forceinline__ Interval rows_of(const Problem& p, int key) const {
    Interval rows = visibility.column(p, key, q_length);
    if (kSegments && p.key_rows) rows = meet(rows, segment_rows_of(p, batch, key));
    return rows;
  }
  // The key blocks that visit a query tile before this one. Not where there are segments.
  __device__ __forceinline__ int visitors_before(const Problem& p, int tile_q) const {
    return block - visibility.row(p, tile_q * kTileQ).begin / kKeys;
  }

  // Query tiles whose rows see all of [first, last]; empty if a key is past kv_length.
  __device__ __forceinline__ Interval whole(const Problem& p, int first, int last) const {
    const Interval a = rows_of(p, first), b = rows_of(p, last);
    const int row_end = a.end >= q_length ? end * kTileQ : a.end;  // the rest is of no concern
    const int low = max((b.begin + kTileQ - 1) / kTileQ, begin), high = min(row_end / kTileQ, end);
    return last >= visibility.kv_length || high <= low ? Interval{begin, begin}
                                                       : Interval{low, high};
  }

 private:
  __device__ __forceinline__ KeyTile(const BackwardParams& params, uint32_t number,
                                     const SectionPlace& at)
      : block(at.turn),
        batch(params.heads_kv.divide(at.head)),
        head_kv(at.head - batch * params.problem.heads_kv),
        scale(params.problem.scale),
        visibility(params.problem, batch) {
    const BackwardProblem& p = params.problem;
    if (p.scale_operand.data) scale *= p.scale_operand.at(batch);
    q_length = p.seq_q;
    const uint32_t rounds_before =
        params.sections_turn ? params.section_tiles.divide(number) : params.round.divide(at.place);
    upward = kMasked && rounds_before % 2 == 1;
    begin = whole_begin = 0;
    end = whole_end = (p.seq_q + kTileQ - 1) / kTileQ;
    if constexpr (kMasked) {
      if (p.query_seq_lengths.data) {
        q_length = max(0, min(q_length, p.query_seq_lengths.at(batch)));
      }
      const int first = first_key(), last = first + kKeys - 1;
      const Interval a = rows_of(p, first), b = rows_of(p, last);
      begin = a.begin / kTileQ;
      end = (b.end + kTileQ - 1) / kTileQ;
      if (first >= visibility.kv_length || a.begin >= b.end) end = begin = 0;
      const Interval all = whole(p, first, last);
      whole_begin = all.begin;
      whole_end = all.end;
    }
  }
};

// Of all blocks; none where this family has no work to do. By a whole warp.
template <int kTile>
__device__ __forceinline__ uint32_t tiles_to_take(const BackwardParams& params) {
  const uint32_t tiles = params.heads * params.tiles_kv;
  return !KeyTile<kTile>::kSegments || has_work<90>(params.problem) ? tiles : 0;
}

// Puts the tile of this number, of `count`, where the other warps of the block read it; past the
// last, that there are no more. By a whole warp.
template <class Memory, class Tile>
__device__ __forceinline__ const Tile& hand_over(const BackwardParams& params, uint32_t number,
                                                 uint32_t count, const Memory& smem, Tile* tiles,
                                                 Ring<2>& ring, bool leader) {
  ptx::mbarrier_wait_warp(smem.tile_empty(ring.stage), ring.parity ^ 1);
  Tile& tile = tiles[ring.stage];
  if (number < count) {
    const Tile made(params, number);
    if (leader) tile = made;
  } else if (leader) {
    tile.block = -1;
  }
  __syncwarp();
  if (leader) ptx::mbarrier_arrive(smem.tile_full(ring.stage));
  ring.next();
  return tile;
}

}  // namespace flash2::sm90
