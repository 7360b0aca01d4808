// Delays for tests: see JAX_FLASH2_PERTURB in CMakeLists.txt.
#pragma once

#include <cstdint>

namespace flash2::ptx {

// Where warps meet, a warp of a perturbed build often stops for up to a microsecond, each time for
// another while. Whoever relies on luck and not on a barrier is found out.
__device__ __forceinline__ void perturb() {
#ifdef FLASH2_PERTURB
  const uint32_t noise =
      (static_cast<uint32_t>(clock64()) + threadIdx.x / 32 * 977 + blockIdx.x) * 2654435761u;
  if (noise >> 30 == 0) __nanosleep(noise >> 18 & 1023);
#endif
}

}  // namespace flash2::ptx
