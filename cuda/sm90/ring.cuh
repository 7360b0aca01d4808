// Where a pipeline stands.
#pragma once

#include <cstdint>

namespace flash2::sm90 {

// A place in a ring of kStages, and the parity of its barriers there.
template <int kStages>
struct Ring {
  uint32_t stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    stage = stage + 1 == kStages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

}  // namespace flash2::sm90
