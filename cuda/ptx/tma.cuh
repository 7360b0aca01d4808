// Inline PTX of compute capability 9.0: bulk copies between global and shared memory by the TMA
// unit, with and without a tensor map, and the fences between it and ordinary accesses.
// PTX ISA 9.7.9.25 to 9.7.9.27, cp.async.bulk, cp.reduce.async.bulk; 9.7.13.4, fence.proxy.
//
// Tensor maps have, but where it says otherwise, four axes, [head_dim, length, heads, batch] from
// the innermost on, a box of 64 columns and the 128-byte swizzle: a row of the box has 128 bytes,
// its 16-byte chunk c lies at chunk c ^ (r % 8). The target of a box lies on a multiple of 1024.
// What is out of range reads as zero, is not written, and counts as transferred.
#pragma once

#include <cuda.h>  // CUtensorMap; nothing of the driver is linked

#include <cstdint>

namespace flash2::ptx {

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// How long the L2 cache should keep what is loaded. 9.7.9.17, createpolicy.
__device__ __forceinline__ uint64_t policy_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint64_t policy_evict_last() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// A box to shared memory; its bytes are counted off from what `barrier` expects.
__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                                         int column, int row, int head, int batch,
                                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(policy)
      : "memory");
}

// A box of a map with the axes [head_dim, heads of a group, length, groups, batch].
__device__ __forceinline__ void tma_load_pack(uint32_t shared, const CUtensorMap* map,
                                              uint32_t barrier, int column, int head, int row,
                                              int group, int batch, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(row), "r"(group), "r"(batch), "l"(policy)
      : "memory");
}

// The same box to the L2 cache.
__device__ __forceinline__ void tma_prefetch_pack(const CUtensorMap* map, int column, int head,
                                                  int row, int group, int batch) {
  asm volatile(
      "cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map),
      "r"(column), "r"(head), "r"(row), "r"(group), "r"(batch)
      : "memory");
}

// As `tma_load`, to every block of the cluster in `mask`, at the same offset there, each with its
// own barrier at the same offset.
__device__ __forceinline__ void tma_load_multicast(uint32_t shared, const CUtensorMap* map,
                                                   uint32_t barrier, int column, int row, int head,
                                                   int batch, uint16_t mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(
          shared),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "h"(mask), "l"(policy)
      : "memory");
}

// The same of a map with two axes, [length, heads] of float32, without a swizzle.
__device__ __forceinline__ void tma_load_rows(uint32_t shared, const CUtensorMap* map,
                                              uint32_t barrier, int row, int head) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(row), "r"(head)
      : "memory");
}

// A box from shared memory; joins this thread's open bulk group.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t shared, int column,
                                          int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], "
      "[%1];" ::"l"(map),
      "r"(shared), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// --- Without a tensor map: addresses and sizes are multiples of 16 bytes

__device__ __forceinline__ void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared), "r"(bytes)
               : "memory");
}

// global[i] += shared[i] in float32; the L2 cache adds.
__device__ __forceinline__ void bulk_add(float* global, uint32_t shared, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
      "r"(shared), "r"(bytes)
      : "memory");
}

// Own shared memory to a peer's (cluster.cuh has the addresses).
__device__ __forceinline__ void bulk_copy_to_peer(uint32_t peer, uint32_t shared, uint32_t bytes,
                                                  uint32_t peer_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(peer),
      "r"(shared), "r"(bytes), "r"(peer_barrier)
      : "memory");
}

// --- Bulk groups of this thread: stores and additions

__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all but `kPending` groups have read their shared memory, which may then be written again.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until all but `kPending` groups are done and their writes are visible to this thread.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- Between ordinary accesses and those of TMA and wgmma. The writers fence, then a barrier.

__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void fence_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace flash2::ptx
