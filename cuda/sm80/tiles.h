// The tiles of the sm80 family, and why each stops where it does (measured on an H100: NOTES.md).
//
//  * A warp of 32 query rows uses each fragment of K and V for two mma instead of one, so shared
//    memory stays below its bandwidth. Its O takes head_dim registers: at 256 only 16 rows fit.
//  * Registers hold eight warps per multiprocessor at 255 each. Two blocks of four drift apart
//    more than one of eight, and the start of one hides behind the other.
//  * Two stages of K and V: a third brought nothing, its memory is better a second block.
//
// The tiles of a bucket are tried in order; the first that fits blocks_per_sm times runs.
#pragma once

#include "problem.h"

namespace flash2::sm80 {

struct ForwardTile {
  int head_dim;    // the bucket
  int row_blocks;  // of 16 query rows, per warp
  int warps;
  int tile_kv;
  int blocks_per_sm;
  int q_steps;  // k16 steps of Q that stay in registers; the rest is read again per block

  FLASH2_HOST_DEVICE constexpr int warp_rows() const { return 16 * row_blocks; }
  FLASH2_HOST_DEVICE constexpr int tile_q() const { return warp_rows() * warps; }
  FLASH2_HOST_DEVICE constexpr int threads() const { return 32 * warps; }
  FLASH2_HOST_DEVICE constexpr int barrier_bytes() const { return 32; }
  // Q, two stages of K and V, two barriers of each kind.
  FLASH2_HOST_DEVICE constexpr int smem_bytes() const {
    return 2 * head_dim * (tile_q() + 4 * tile_kv) + barrier_bytes();
  }
};

inline constexpr ForwardTile kForwardTiles[] = {
    // 48 KB, two blocks on every device (98 of 100 KB on 8.6 and 8.9). Q fits the registers beside
    // O and S. Three blocks of 168 registers: 4 % faster at length 512, 5 % slower from 2048 on.
    {64, 2, 4, 64, 2, 4},
    // 96 KB. Beside O (128 registers) and S (64) no step of Q fits: two of them cost 7 %, since
    // then none is left to load fragments ahead. tile_kv 32 costs 11 %: more softmax steps.
    {128, 2, 4, 64, 2, 0},
    // 128 KB for the 163 KB of 8.0: eight warps in one block; 3 % slower than two blocks of four.
    {128, 2, 8, 64, 1, 0},
    // 96 KB for the 99 KB of 8.6 and 8.9, likewise.
    {128, 2, 8, 32, 1, 0},
    // 192 KB. Here shared memory's bandwidth is the limit: eight warps share what is written of K
    // and V, and 8 of Q's 16 steps stay in registers. 4 steps: 2 % slower; 10: 6 %, as above.
    {256, 1, 8, 64, 1, 8},
    // 128 KB for the 163 KB of 8.0.
    {256, 1, 8, 32, 1, 8},
    // 96 KB for the 99 KB of 8.6 and 8.9.
    {256, 1, 4, 32, 1, 16},
};
inline constexpr int kForwardTileCount = sizeof(kForwardTiles) / sizeof(kForwardTiles[0]);

// The backward's: backward.cuh has the two kernels. A warp holds 16 * key_blocks keys of dK or dV,
// or of both where there is one role.
struct BackwardTile {
  int head_dim;    // the bucket
  int roles;       // of four warps each
  int key_blocks;  // of 16 keys, per warp
  int key_warps;   // warps of a role side by side along the keys: 4, or 2 that split the queries
                   // and the columns of dK and dV too
  int tile_q;
  int stages;  // of Q and dO

  FLASH2_HOST_DEVICE constexpr int tile_kv() const { return 16 * key_blocks * key_warps; }
  FLASH2_HOST_DEVICE constexpr int threads() const { return 128 * roles; }
  FLASH2_HOST_DEVICE constexpr int ds_buffers() const { return roles == 1 ? 2 : 1; }
  // P on its way from one role to the other and, where warps split the queries, to its neighbour.
  FLASH2_HOST_DEVICE constexpr int hand_bytes() const {
    return roles == 1 ? 0 : 2 * tile_kv() * tile_q * (4 / key_warps);
  }
  FLASH2_HOST_DEVICE constexpr int barrier_bytes() const { return 128; }
  // K and V, the stages with their logsumexps and deltas, dS in rows of 128 bytes, P, barriers.
  FLASH2_HOST_DEVICE constexpr int smem_bytes() const {
    return 4 * head_dim * tile_kv() + stages * (4 * head_dim + 8) * tile_q +
           ds_buffers() * 128 * tile_kv() + hand_bytes() + barrier_bytes();
  }
};

// The tiles of a bucket are tried in order; the first that fits runs. dQ is added to float32 sums
// once per key tile, so key tiles are as wide as registers allow: 128, and 64 at head_dim 256.
inline constexpr BackwardTile kBackwardTiles[] = {
    {64, 1, 2, 4, 64, 2},   // 97 KB: twice, or once within the 99 KB of 8.6 and 8.9
    {128, 2, 2, 4, 64, 3},  // 193 KB
    {128, 2, 2, 4, 64, 2},  // 161 KB for the 163 KB of 8.0
    {128, 2, 1, 4, 32, 2},  // 76 KB for the 99 KB of 8.6 and 8.9
    {256, 2, 2, 2, 64, 2},  // 217 KB
    {256, 2, 2, 2, 64, 1},  // 153 KB for the 163 KB of 8.0
    {256, 2, 1, 4, 16, 1},  // 90 KB for the 99 KB of 8.6 and 8.9
};
inline constexpr int kBackwardTileCount = sizeof(kBackwardTiles) / sizeof(kBackwardTiles[0]);

}  // namespace flash2::sm80
