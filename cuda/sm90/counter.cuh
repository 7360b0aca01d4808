// The counter from which resident blocks take their next tile.
//
// It lies in a workspace of the call, which XLA gives to no other call while this one runs, so
// launches on several streams or in several branches of a graph never share one. But a workspace
// comes with whatever was there before, and a memset would be a node of its own, 1 to 2 us of a
// call that may take 100. So the counter carries a key, 64 random bits of the launch: whoever
// comes first and finds another key begins to count, with one compare-and-swap of key and count.
//
// A replayed graph uses its key again. Each block takes a number once per tile that it ran, which
// makes exactly `tiles` numbers, and whoever takes the last removes the key. So a key is there
// only while its launch runs, and what another left can be mistaken for it only if 64 bits of
// other data are equal by chance.
#pragma once

#include <cstdint>

#include "ptx/atomic.cuh"

namespace flash2 {

class TileCounter {
 public:
  // To be called once per block before `take`.
  __device__ __forceinline__ void join(uint64_t key) {
    ptx::Words found{0, 0};
    for (;;) {
      const ptx::Words before = ptx::compare_and_swap(&words_, found, ptx::Words{key, 0});
      if (before.low == key) return;
      if (before.low == found.low && before.high == found.high) return;
      found = before;
    }
  }

  // Numbers from 0 on, each to one caller; `tiles` of them in all.
  __device__ __forceinline__ uint32_t take(uint32_t tiles) {
    const uint32_t number = atomicAdd(reinterpret_cast<unsigned*>(&words_.high), 1u);
    if (number == tiles - 1) words_.low = 0;
    return number;
  }

 private:
  ptx::Words words_;  // key, and how many numbers have been taken
};

}  // namespace flash2
