// Which key tile a block of the backward computes, and which query tiles it needs.
#pragma once

#include <cstdint>

#include "mask.cuh"
#include "params.h"
#include "problem.h"
#include "scheduler.cuh"

namespace flash2 {

// The key tile number `index` in the order of work, and all that is looked up or derived for it.
//
// Key heads are walked in sections, as query heads are in the forward; inside a section the first
// tiles of all its heads come first, because under a causal mask they take longest.
template <int kTileQ, int kTileKv>
struct BackwardWork {
  int batch;
  int head_kv;
  int key0;      // of the tile
  int q_length;  // rows at or past it see nothing
  Visibility visibility;
  int first_q;  // query tiles [first_q, end_q) of each head hold rows that see a key of the tile
  int end_q;

  __device__ __forceinline__ BackwardWork(const BackwardParams& params, uint32_t index)
      : BackwardWork(params, Place(params, index)) {}

  __device__ __forceinline__ int last_row(int tile) const {
    return min(tile * kTileQ + kTileQ, q_length) - 1;
  }

 private:
  struct Place {
    int batch;
    int head;
    int tile;

    __device__ __forceinline__ Place(const BackwardParams& params, uint32_t index) {
      const SectionPlace at(index, params.tiles_kv, params.heads, params.section,
                            params.section_tiles);
      tile = at.turn;
      batch = params.heads_kv.divide(at.head);
      head = at.head - batch * params.problem.heads_kv;
    }
  };

  // The first tile of [begin, end) of which `holds` is true; it is false before and true after.
  template <class Predicate>
  static __device__ __forceinline__ int first_true(int begin, int end, Predicate holds) {
    while (begin < end) {
      const int middle = (begin + end) / 2;
      if (holds(middle)) {
        end = middle;
      } else {
        begin = middle + 1;
      }
    }
    return begin;
  }

  __device__ __forceinline__ BackwardWork(const BackwardParams& params, const Place& place)
      : batch(place.batch),
        head_kv(place.head),
        key0(place.tile * kTileKv),
        visibility(params.problem, place.batch) {
    const BackwardProblem& p = params.problem;
    q_length = p.seq_q;
    if (p.query_seq_lengths.data) q_length = min(q_length, p.query_seq_lengths.at(batch));
    const int tiles = (max(q_length, 0) + kTileQ - 1) / kTileQ;
    const int key_end = min(key0 + kTileKv, visibility.kv_length);
    // Both ends of a row's interval rise with the row.
    first_q =
        first_true(0, tiles, [&](int t) { return visibility.row(p, last_row(t)).end > key0; });
    end_q = first_true(first_q, tiles,
                       [&](int t) { return visibility.row(p, t * kTileQ).begin >= key_end; });
  }
};

}  // namespace flash2
