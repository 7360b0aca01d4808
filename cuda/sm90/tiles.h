// The tiles of the sm90 family, and why each stops where it does (measured on an H100: NOTES.md).
//
//  * A consumer owns 64 rows. Two of them have 232 registers a thread beside a producer's 40,
//    three have 160 and 32; one has 216 and leaves half a multiprocessor to another block.
//  * O takes head_dim / 2 registers, S tile_kv / 2, P half of that: what is left bounds tile_kv.
//  * Two stages of K and of V. At head_dim 64 four, and at 128 three with one of Q, gained
//    nothing, but for pairs of blocks.
#pragma once

#include "problem.h"

namespace flash2::sm90 {

struct ForwardTile {
  int head_dim;   // the most that it serves
  int consumers;  // warpgroups of 64 query rows
  int tile_kv;
  int q_stages;            // 2: the next tile's Q is loaded while this one's is in use
  int split = 0;           // eighths of a step's exponentials that must not wait for P V
  bool masked = false;     // with code for masks; else only the last block of keys may be ragged
  bool ping_pong = false;  // the consumers take turns on the tensor cores
  bool rescale_early = false;  // O is rescaled while Q K^T runs, not after P V
  bool store_late = false;  // O is stored while the next tile's second Q K^T runs, not before it
  bool joins = false;       // a cluster shares the keys of each tile: join.cuh
  // Two blocks, a cluster, work on neighbouring tiles of a head: each brings half of every K and V
  // for both. A consumer keeps Q in registers, so that shared memory has room for a third stage,
  // without which the blocks wait for each other.
  bool pairs = false;
  bool capped = false;  // for scores with a soft cap, with masks or without

  // The same with these members, which are flags, set.
  template <class... Flags>
  constexpr ForwardTile with(Flags... flags) const {
    ForwardTile tile = *this;
    ((tile.*flags = true), ...);
    return tile;
  }

  FLASH2_HOST_DEVICE constexpr int bucket() const { return head_dim == 192 ? 256 : head_dim; }
  // Of K and of V.
  FLASH2_HOST_DEVICE constexpr int stages() const { return pairs || consumers == 1 ? 3 : 2; }
  // Blocks that bring K and V together, and the rows that each of them brings.
  FLASH2_HOST_DEVICE constexpr int blocks() const { return pairs ? 2 : 1; }
  FLASH2_HOST_DEVICE constexpr int box_kv() const { return tile_kv / blocks(); }
  // Whether a tile may hold several query heads of a key head. The others have no registers for it
  // (head_dim 64, three consumers) or no masks, and where heads are packed copies take the time.
  FLASH2_HOST_DEVICE constexpr bool packs() const { return masked && consumers <= 2; }
  // Whether a tile's last P V and its end come before the next tile's first Q K^T: with one place
  // for Q. Where there are two it loses up to 3 %.
  FLASH2_HOST_DEVICE constexpr bool ends_first() const {
    return q_stages == 1 && !pairs && !joins;
  }
  // Whether the next tile's Q is called into the L2 cache as soon as that tile is known. It gained
  // 2 to 4 % at length 512 without masks, and lost up to 9 % with them and at head_dim 256.
  FLASH2_HOST_DEVICE constexpr bool prefetches_q() const { return !masked && head_dim <= 128; }
  // Lanes that exchange words of the output. Two take half the instructions and write 32 bytes of
  // a row at a time, which gains 1 to 2 % up to length 1024 and loses as much at head_dim 256.
  FLASH2_HOST_DEVICE constexpr int out_lanes() const { return head_dim <= 128 ? 2 : 4; }
  FLASH2_HOST_DEVICE constexpr int tile_q() const { return 64 * consumers; }
  FLASH2_HOST_DEVICE constexpr int blocks_per_sm() const { return consumers == 1 ? 2 : 1; }
  FLASH2_HOST_DEVICE constexpr int threads() const { return 128 * (consumers + 1); }
  // Of a block's part of 65536 registers; the producer's warpgroup gives what it does not need.
  FLASH2_HOST_DEVICE constexpr int producer_registers() const { return consumers <= 2 ? 40 : 32; }
  FLASH2_HOST_DEVICE constexpr int consumer_registers() const {
    return consumers == 1 ? 216 : consumers == 2 ? 232 : 160;
  }
  FLASH2_HOST_DEVICE constexpr int q_bytes() const { return 64 * head_dim * 2; }  // one consumer's
  FLASH2_HOST_DEVICE constexpr int kv_bytes() const { return tile_kv * head_dim * 2; }
  FLASH2_HOST_DEVICE constexpr int state_bytes() const { return 512; }
  FLASH2_HOST_DEVICE constexpr int smem_bytes() const {
    return q_stages * consumers * q_bytes() + 2 * stages() * kv_bytes() + state_bytes();
  }
};

inline constexpr ForwardTile kForwardTiles[] = {
    // 113 KB. Here exponentials cost as much as products, and a third consumer fills the gaps of
    // the other two: two are 15 to 25 % slower. Only here it helps to take turns.
    ForwardTile{64, 3, 128, 2}.with(&ForwardTile::ping_pong),
    // 97 KB, for lengths up to kShort: no row of the last tile is wasted, and the diagonal wastes
    // less. From 2048 on three consumers lead.
    ForwardTile{64, 2, 128, 2}.with(&ForwardTile::masked, &ForwardTile::ping_pong),
    ForwardTile{64, 3, 128, 2}.with(&ForwardTile::masked, &ForwardTile::ping_pong),
    // 105 KB, and half of the registers: where keys are shared out, two blocks run on a
    // multiprocessor, and one begins and ends while the other reads.
    ForwardTile{64, 1, 128, 1}.with(&ForwardTile::masked, &ForwardTile::joins),
    // 193 KB. 128 x 176 has room for one stage of Q only and was 0 to 4 % slower.
    ForwardTile{128, 2, 128, 2, 3}.with(&ForwardTile::store_late),
    // 225 KB, for many keys: where the chip runs at its power limit, every byte that does not come
    // from the L2 cache is speed.
    ForwardTile{128, 2, 128, 1, 3}.with(&ForwardTile::store_late, &ForwardTile::pairs),
    ForwardTile{128, 2, 128, 2, 3}.with(&ForwardTile::masked),
    // 113 KB.
    ForwardTile{128, 1, 64, 1, 3}.with(&ForwardTile::masked, &ForwardTile::joins),
    // 225 KB of the 227 there are.
    ForwardTile{256, 2, 80, 1}.with(&ForwardTile::rescale_early),
    // 64 keys of the 80 there is room for waste less of the diagonal: 3 % faster at 512, level at
    // 16k.
    ForwardTile{256, 2, 64, 1}.with(&ForwardTile::masked, &ForwardTile::rescale_early),
    ForwardTile{256, 2, 80, 1}.with(&ForwardTile::masked, &ForwardTile::rescale_early,
                                    &ForwardTile::joins),
    // 217 KB. For head_dims of the bucket 256 that three panels hold.
    ForwardTile{192, 2, 112, 1}.with(&ForwardTile::rescale_early),
    ForwardTile{192, 2, 112, 1}.with(&ForwardTile::masked, &ForwardTile::rescale_early),
    // With masks or without: there the cap's own arithmetic is the limit.
    ForwardTile{64, 2, 128, 2}.with(&ForwardTile::masked, &ForwardTile::ping_pong,
                                    &ForwardTile::capped),
    ForwardTile{128, 2, 128, 2, 3}.with(&ForwardTile::masked, &ForwardTile::capped),
    ForwardTile{256, 2, 80, 1}.with(&ForwardTile::masked, &ForwardTile::rescale_early,
                                    &ForwardTile::capped),
    ForwardTile{64, 1, 128, 1}.with(&ForwardTile::masked, &ForwardTile::joins,
                                    &ForwardTile::capped),
    ForwardTile{128, 1, 64, 1, 3}.with(&ForwardTile::masked, &ForwardTile::joins,
                                       &ForwardTile::capped),
    ForwardTile{256, 2, 80, 1}.with(&ForwardTile::masked, &ForwardTile::rescale_early,
                                    &ForwardTile::joins, &ForwardTile::capped),
};
// Query lengths up to it prefer the first masked tile of a bucket, longer ones the last.
inline constexpr int kShort = 1024;
// From so many keys on pairs lead; with few, blocks wait for each other more than they save.
inline constexpr int kPairsKeys = 8192;
inline constexpr int kForwardTileCount = sizeof(kForwardTiles) / sizeof(kForwardTiles[0]);

}  // namespace flash2::sm90
