// The tiles of the sm90 backward (measured on an H100: NOTES_backward.md).
//
// A tile is 128 keys of one head; Q and dO pass by in steps of tile_q rows. Larger steps need
// fewer barriers, and float32 traffic for dQ falls with the number of keys, so both stop where
// registers and shared memory do: at head_dim 256 no block can hold the gradients of 128 keys, and
// two that form a cluster do (backward_pair.cuh).
#pragma once

#include "problem.h"

namespace flash2::sm90 {

struct BackwardTile {
  int head_dim;  // the bucket
  int tile_q;
  int blocks;  // that share the keys
  bool masked = false;
  bool deterministic = false;  // a kernel of its own; else the kernel looks at the problem
  // Pair: whoever adds to sums of dQ may have to wait for others, because sums are deterministic
  // or because the first stores.
  bool turns = false;
  // Walks of key tiles that are at work at once begin at query tiles of their own and go around;
  // whoever comes first to a query tile stores. (One kernel for both ways: 1 % slower long walks.)
  bool around = false;
  bool capped = false;  // for scores with a soft cap, with masks or without

  // The same with these members, which are flags, set.
  template <class... Flags>
  constexpr BackwardTile with(Flags... flags) const {
    BackwardTile tile = *this;
    ((tile.*flags = true), ...);
    return tile;
  }

  FLASH2_HOST_DEVICE constexpr int tile_kv() const { return 128; }
  FLASH2_HOST_DEVICE constexpr int keys() const { return tile_kv() / blocks; }  // of one block
  FLASH2_HOST_DEVICE constexpr int threads() const { return 384; }
  FLASH2_HOST_DEVICE constexpr int panels() const { return head_dim / 64; }
  FLASH2_HOST_DEVICE constexpr int kv_bytes() const { return 2 * head_dim * keys(); }
  FLASH2_HOST_DEVICE constexpr int stage_bytes() const { return 2 * head_dim * tile_q; }
  FLASH2_HOST_DEVICE constexpr int ds_bytes() const { return 2 * tile_q * tile_kv(); }
  // One: K, V, two stages of Q and of dO, two of dS, the float32 dQ.
  // With a finisher: the float32 sums of a step's dQ besides.
  // Pair: K, V, half of the other block's K, two stages of Q and of dO, dS.
  FLASH2_HOST_DEVICE constexpr int tiles_bytes() const {
    return 2 * kv_bytes() + 4 * stage_bytes() +
           (blocks == 1 ? 2 * ds_bytes() + 2 * stage_bytes() : kv_bytes() / 2 + ds_bytes()) +
           (finishes() ? 2 * stage_bytes() : 0);
  }
  // Logsumexps or deltas of a step; TMA writes to multiples of 128.
  FLASH2_HOST_DEVICE constexpr int rows_bytes() const { return (4 * tile_q + 127) / 128 * 128; }
  FLASH2_HOST_DEVICE constexpr int barriers_bytes() const { return 256; }
  // Two stages of logsumexps and deltas, two key tiles (KeyTile), barriers.
  FLASH2_HOST_DEVICE constexpr int smem_bytes() const {
    return tiles_bytes() + 4 * rows_bytes() + 2 * 64 + barriers_bytes();
  }
  // Has a warp that makes dQ from its sums while the others go on (backward_finish.cuh).
  FLASH2_HOST_DEVICE constexpr bool finishes() const { return head_dim == 64; }
  // A step's dQ is computed as its transpose, of which each consumer has 64 rows.
  FLASH2_HOST_DEVICE constexpr bool transposed() const { return tile_q % 64 != 0; }
};

inline constexpr BackwardTile kBackwardTiles[] = {
    // 226 KB.
    BackwardTile{64, 128, 1},
    BackwardTile{64, 128, 1}.with(&BackwardTile::masked),
    // 193 KB.
    BackwardTile{128, 64, 1},
    // 226 KB. For long walks: a fifth fewer steps, hence barriers.
    BackwardTile{128, 80, 1},
    BackwardTile{64, 128, 1}.with(&BackwardTile::around),
    BackwardTile{128, 64, 1}.with(&BackwardTile::around),
    BackwardTile{128, 80, 1}.with(&BackwardTile::around),
    BackwardTile{128, 64, 1}.with(&BackwardTile::masked),
    BackwardTile{128, 64, 1}.with(&BackwardTile::masked, &BackwardTile::deterministic),
    // 225 KB, twice.
    BackwardTile{256, 64, 2},
    BackwardTile{256, 64, 2}.with(&BackwardTile::masked),
    BackwardTile{256, 64, 2}.with(&BackwardTile::turns),
    BackwardTile{256, 64, 2}.with(&BackwardTile::masked, &BackwardTile::turns),
    // None at head_dim 64: a cap's derivative takes registers that no step of 128 queries has.
    BackwardTile{128, 64, 1}.with(&BackwardTile::masked, &BackwardTile::capped),
    BackwardTile{128, 64, 1}.with(&BackwardTile::masked, &BackwardTile::deterministic,
                                  &BackwardTile::capped),
    BackwardTile{256, 64, 2}.with(&BackwardTile::masked, &BackwardTile::capped),
    BackwardTile{256, 64, 2}.with(&BackwardTile::masked, &BackwardTile::turns,
                                  &BackwardTile::capped),
};
inline constexpr int kBackwardTileCount = sizeof(kBackwardTiles) / sizeof(kBackwardTiles[0]);

}  // namespace flash2::sm90
