// Delays for tests: see JAX_FLASH2_PERTURB in CMakeLists.txt.
#pragma once

#include <cstdint>

namespace flash2::ptx {

// Where whole warps wait for others, a warp of a perturbed build often stops for up to a
// microsecond, each time for another while. Whoever relies on luck and not on a barrier is found
// out. Without a branch, which would make the assembler serialise wgmma (C7520).
__device__ __forceinline__ void perturb() {
#ifdef FLASH2_PERTURB
  const uint32_t noise =
      (static_cast<uint32_t>(clock64()) + threadIdx.x / 32 * 977 + blockIdx.x) * 2654435761u;
  __nanosleep(noise >> 30 == 0 ? noise >> 18 & 1023 : 0);
#endif
}

}  // namespace flash2::ptx
