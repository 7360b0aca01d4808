// The tiles of the sm90 family, and why each stops where it does (measured on an H100: NOTES.md).
#pragma once

#include "problem.h"

namespace flash2::sm90 {

struct ForwardTile {
  int head_dim;   // the bucket
  bool masked;    // with code for masks; else only the last block of keys may be ragged
  int consumers;  // warpgroups of 64 query rows
  int tile_kv;
  int q_stages;        // 2: the next tile's Q is loaded while this one's is in use
  bool ping_pong;      // the consumers take turns on the tensor cores
  bool rescale_early;  // O is rescaled while Q K^T runs, not after P V
  int split;           // eighths of a step's exponentials that must not wait for P V

  FLASH2_HOST_DEVICE constexpr int tile_q() const { return 64 * consumers; }
  FLASH2_HOST_DEVICE constexpr int threads() const { return 128 * (consumers + 1); }
  // Of 65536 registers; the producer's warpgroup gives what it does not need.
  FLASH2_HOST_DEVICE constexpr int producer_registers() const { return consumers == 2 ? 24 : 32; }
  FLASH2_HOST_DEVICE constexpr int consumer_registers() const {
    return consumers == 2 ? 240 : 160;
  }
  FLASH2_HOST_DEVICE constexpr int q_bytes() const { return 64 * head_dim * 2; }  // one consumer's
  FLASH2_HOST_DEVICE constexpr int kv_bytes() const { return tile_kv * head_dim * 2; }
  FLASH2_HOST_DEVICE constexpr int barrier_bytes() const { return 256; }
  FLASH2_HOST_DEVICE constexpr int smem_bytes() const {
    return q_stages * consumers * q_bytes() + 4 * kv_bytes() + barrier_bytes();
  }
};

inline constexpr ForwardTile kForwardTiles[] = {
    {64, false, 3, 128, 2, true, false, 0},  {64, false, 2, 128, 2, true, false, 0},
    {64, true, 3, 128, 2, true, false, 0},   {64, true, 2, 128, 2, true, false, 0},
    {128, false, 2, 128, 2, true, false, 0}, {128, false, 2, 128, 2, false, false, 3},
    {128, false, 2, 176, 1, true, false, 3}, {128, false, 2, 176, 1, true, false, 0},
    {128, true, 2, 128, 2, true, false, 0},  {128, true, 2, 128, 2, false, false, 3},
    {128, true, 2, 128, 2, true, false, 3},  {256, false, 2, 80, 1, true, true, 0},
    {256, false, 2, 80, 1, false, true, 0},  {256, true, 2, 80, 1, true, true, 0},
    {256, true, 2, 80, 1, false, true, 0},
};
inline constexpr int kForwardTileCount = sizeof(kForwardTiles) / sizeof(kForwardTiles[0]);

}  // namespace flash2::sm90
