// Inline PTX of compute capability 9.0: atomics of 16 bytes. PTX ISA 9.7.13.5, atom.
#pragma once

#include <cstdint>

namespace flash2::ptx {

struct alignas(16) Words {
  uint64_t low;
  uint64_t high;
};

// If *global is `expected`, makes it `desired`. Returns what was there.
__device__ __forceinline__ Words compare_and_swap(Words* global, Words expected, Words desired) {
  Words found;
  asm volatile(
      "{\n.reg .b128 f, e, d;\nmov.b128 e, {%3, %4};\nmov.b128 d, {%5, %6};\n"
      "atom.relaxed.gpu.global.cas.b128 f, [%2], e, d;\nmov.b128 {%0, %1}, f;\n}"
      : "=l"(found.low), "=l"(found.high)
      : "l"(global), "l"(expected.low), "l"(expected.high), "l"(desired.low), "l"(desired.high)
      : "memory");
  return found;
}

}  // namespace flash2::ptx
