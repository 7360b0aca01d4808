// The tiles of the sm90 family, and why each stops where it does (measured on an H100: NOTES.md).
#pragma once

#include "problem.h"

namespace flash2::sm90 {

struct ForwardTile {
  int head_dim;   // the bucket
  bool masked;    // with code for masks; else only the last block of keys may be ragged
  int consumers;  // warpgroups of 64 query rows
  int tile_kv;
  int stages;          // blocks of K and of V in shared memory
  int q_stages;        // 2: the next tile's Q is loaded while this one's is in use
  bool ping_pong;      // the consumers take turns on the tensor cores
  bool rescale_early;  // O is rescaled while Q K^T runs, not after P V
  bool late_store;
  int split;  // eighths of a step's exponentials that must not wait for P V

  FLASH2_HOST_DEVICE constexpr int tile_q() const { return 64 * consumers; }
  FLASH2_HOST_DEVICE constexpr int threads() const { return 128 * (consumers + 1); }
  // Of 65536 registers; the producer's warpgroup gives what it does not need.
  FLASH2_HOST_DEVICE constexpr int producer_registers() const { return consumers == 2 ? 40 : 32; }
  FLASH2_HOST_DEVICE constexpr int consumer_registers() const {
    return consumers == 2 ? 232 : 160;
  }
  FLASH2_HOST_DEVICE constexpr int q_bytes() const { return 64 * head_dim * 2; }  // one consumer's
  FLASH2_HOST_DEVICE constexpr int kv_bytes() const { return tile_kv * head_dim * 2; }
  FLASH2_HOST_DEVICE constexpr int state_bytes() const { return 512; }
  FLASH2_HOST_DEVICE constexpr int smem_bytes() const {
    return q_stages * consumers * q_bytes() + 2 * stages * kv_bytes() + state_bytes();
  }
};

inline constexpr ForwardTile kForwardTiles[] = {
    {64, false, 3, 128, 2, 2, true, false, false, 0},
    {64, true, 3, 128, 2, 2, true, false, false, 0},
    {64, true, 2, 128, 2, 2, true, false, false, 0},
    {128, false, 2, 128, 2, 2, false, false, true, 3},
    {128, true, 2, 128, 2, 2, false, false, true, 3},
    {256, false, 2, 80, 2, 1, false, true, true, 0},
    {256, true, 2, 80, 2, 1, false, true, false, 0},
    {64, false, 3, 128, 2, 2, true, false, true, 0},
    {64, true, 2, 128, 2, 2, true, false, true, 0},
    {64, true, 3, 128, 2, 2, true, false, true, 0},
    {256, true, 2, 80, 2, 1, false, true, true, 0},
    {128, true, 2, 128, 2, 2, false, false, false, 3},
};
inline constexpr int kForwardTileCount = sizeof(kForwardTiles) / sizeof(kForwardTiles[0]);

}  // namespace flash2::sm90
