// Inline PTX of compute capability 9.0: clusters of blocks and their shared memory.
// PTX ISA 9.7.13.3, barrier.cluster; 9.7.9.22, mapa.
#pragma once

#include <cstdint>

namespace flash2::ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address in the cluster of what lies at `shared` in the block of this rank.
__device__ __forceinline__ uint32_t peer_address(uint32_t shared, uint32_t rank) {
  uint32_t peer;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(shared), "r"(rank));
  return peer;
}

// Stores, and completes 4 bytes of what the barrier beside `peer`, in the same block, expects.
__device__ __forceinline__ void store_peer_async(uint32_t peer, uint32_t value,
                                                 uint32_t peer_barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(peer),
      "r"(value), "r"(peer_barrier)
      : "memory");
}

__device__ __forceinline__ float2 load_peer_8(uint32_t peer) {
  float2 v;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "r"(peer)
               : "memory");
  return v;
}

__device__ __forceinline__ float4 load_peer_16(uint32_t peer) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(peer)
               : "memory");
  return v;
}

// Enough for stages that only TMA writes and only wgmma reads.
__device__ __forceinline__ void mbarrier_arrive_peer(uint32_t peer_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(peer_barrier) : "memory");
}

}  // namespace flash2::ptx
