// From the number of a tile to what it is. Tiles are counted through in x alone, which has room
// for 2^31 - 1 of them.
#pragma once

#include <cstdint>

#include "mask.cuh"
#include "params.h"
#include "problem.h"

namespace flash2 {

// Tile number `index` in an order that walks heads in sections and, inside a section, takes one
// tile of each of its heads in turn. From head `last` on, all that are left are one section.
struct SectionPlace {
  uint32_t head;
  uint32_t turn;   // tiles of this head that come before
  uint32_t place;  // tiles of this section that come before

  __device__ __forceinline__ SectionPlace(uint32_t index, uint32_t tiles, uint32_t heads,
                                          const Divisor& section, const Divisor& section_tiles,
                                          uint32_t last = ~0u) {
    const uint32_t first = min(section_tiles.divide(index) * section.value, last);
    place = index - first * tiles;
    uint32_t count = section.value;
    turn = section.divide(place);
    if (first == last || count > heads - first) {  // the last section has another size
      count = heads - first;
      turn = place / count;
    }
    head = first + place - turn * count;
  }
};

// A query tile and all that is looked up or derived for it. Taken by whole warps.
//
// Heads are walked in sections whose keys and values fit the L2 cache together. Inside a section
// the last tiles of all its heads come first, because under a causal mask they take longest, and
// the next tile goes to whichever multiprocessor is free. Without such a mask a section is one
// head, which keeps the tiles that share keys together.
template <int kTileQ, int kTileKv>
struct ForwardWork {
  int batch;
  int head;         // or pack of heads
  int row0;         // of the tile
  int q_length;     // rows at or past it see nothing
  const char* key;  // of the batch entry and the head
  const char* value;
  Visibility visibility;
  BlockRange<kTileKv> range;

  // `rows` of each head are in a tile: fewer than kTileQ where it holds several heads.
  __device__ __forceinline__ ForwardWork(const ForwardParams& params, uint32_t tile,
                                         int rows = kTileQ)
      : ForwardWork(params, Place(params, tile, rows), rows) {}

 private:
  struct Place {
    int batch;
    int head;
    int row0;
    int q_length;

    __device__ __forceinline__ Place(const ForwardParams& params, uint32_t tile, int rows) {
      const ForwardProblem& p = params.problem;
      const SectionPlace at(tile, params.tiles_q, params.all_packs, params.section,
                            params.section_tiles, params.last_section);
      batch = params.packs.divide(at.head);
      head = at.head - batch * params.packs.value;
      row0 = static_cast<int>(params.tiles_q - 1 - at.turn) * rows;
      q_length = p.seq_q;
      if (p.query_seq_lengths.data) q_length = min(q_length, p.query_seq_lengths.at(batch));
    }
  };

  __device__ __forceinline__ ForwardWork(const ForwardParams& params, const Place& place, int rows)
      : batch(place.batch),
        head(place.head),
        row0(place.row0),
        q_length(place.q_length),
        visibility(params.problem, place.batch),
        range(params.problem, visibility, place.row0, min(place.row0 + rows, place.q_length) - 1) {
    const ForwardProblem& p = params.problem;
    const int head_kv = params.group.divide(head);
    key = static_cast<const char*>(p.key) +
          2 * (batch * p.key_stride.batch + head_kv * p.key_stride.head);
    value = static_cast<const char*>(p.value) +
            2 * (batch * p.value_stride.batch + head_kv * p.value_stride.head);
  }
};

}  // namespace flash2
