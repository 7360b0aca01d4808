// Inline PTX of compute capability 9.0: what warp-specialised kernels need beside copies and
// products.
#pragma once

#include <cstdint>

#include "ptx/common.cuh"

namespace flash2::ptx {

// Registers of each thread of the warpgroup, a multiple of 8. All of its warps must execute it,
// and the kernel must have launch bounds with a minimum of blocks. PTX ISA 9.7.19, setmaxnreg.
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Named barriers, 1 to 15; 0 is __syncthreads. `threads` counts those who wait and those who only
// arrive. PTX ISA 9.7.13.1, bar.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  perturb();
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The same for warps that meet at different places in the code. bar.sync, the aligned form,
// promises that all who wait execute one instruction.
__device__ __forceinline__ void barrier_sync_unaligned(int barrier, int threads) {
  perturb();
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  perturb();
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Four 8x8 blocks of 16 bits; lanes 8i..8i+7 give the row addresses of block i. The registers are
// as mma's and wgmma's accumulators, packed. PTX ISA 9.7.14.5.16, stmatrix.
__device__ __forceinline__ void store_matrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// The row at a lane's address receives a column of the block.
__device__ __forceinline__ void store_matrix_x4_transposed(uint32_t address,
                                                           const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

// Programmatic dependent launch: the next kernel of the stream may start; everything that the
// kernels before have written is visible. PTX ISA 9.7.13.13, griddepcontrol. Before 9.0 no kernel
// starts early.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_prerequisites() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace flash2::ptx
