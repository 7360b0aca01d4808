#include "launch.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdint>

#include "params.h"
#include "plan.h"
#include "problem.h"
#include "sm90/choose.h"
#include "sm90/kernels.h"
#include "sm90/tiles.h"
#include "tensor_map.h"

namespace flash2::sm90 {
namespace {

// A number that no other launch has, in this process or another, but by a chance of 2^-64:
// splitmix64 of a count that starts with the time.
uint64_t launch_key() {
  static std::atomic<uint64_t> count{
      static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count())};
  uint64_t x = count.fetch_add(0x9e3779b97f4a7c15u, std::memory_order_relaxed);
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

int encode_maps(const ForwardProblem& p, const ForwardPlan& plan, ForwardMaps* maps) {
  const Array query{p.query, p.query_stride, p.batch, p.seq_q, p.heads_q, p.head_dim};
  const Array key{p.key, p.key_stride, p.batch, p.seq_kv, p.heads_kv, p.head_dim};
  const Array value{p.value, p.value_stride, p.batch, p.seq_kv, p.heads_kv, p.head_dim_v};
  if (int error = encode_pack_map(query, p.data_type, p.heads_q / p.heads_kv, plan.pack,
                                  64 / plan.pack, &maps->query)) {
    return error;
  }
  const int rows = kForwardTiles[plan.variant].box_kv();
  const bool once = plan.splits > 1;
  if (int error = encode_tensor_map(key, p.data_type, rows, &maps->key, once)) return error;
  return encode_tensor_map(value, p.data_type, rows, &maps->value, once);
}

}  // namespace

int launch_forward(const ForwardProblem& problem, const ForwardPlan& plan, void* workspace,
                   CUstream_st* stream) {
  const bool bfloat16 = problem.data_type == DataType::kBFloat16;
  const void* kernel =
      find_kernel(problem.data_type, plan.head_dim, [&](auto head_dim, auto type) {
        return forward_kernel<head_dim(), type()>(plan.variant, plan.general);
      });
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  static SmemAllowance allowance;
  static_assert(2 * kForwardTileCount <= 64);
  const int bit = 2 * plan.variant + bfloat16;
  if (int error = allowance.ask(kernel, bit, plan.smem_bytes)) return error;

  ForwardMaps maps;
  if (int error = encode_maps(problem, plan, &maps)) return error;
  ForwardParams params = make_params(problem, plan);
  const bool counts = counts_tiles(plan);
  int pack_shift = 0;
  while (1 << pack_shift < plan.pack) ++pack_shift;
  ForwardSchedule schedule{params.all_packs * params.tiles_q,
                           0,
                           counts ? static_cast<TileCounter*>(workspace) : nullptr,
                           counts ? launch_key() : 0,
                           pack_shift,
                           problem.heads_q / problem.heads_kv,
                           plan.splits};
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.grid);
  config.blockDim = dim3(plan.block);
  config.dynamicSmemBytes = plan.smem_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;
  void* arguments[] = {&maps, &params, &schedule};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace flash2::sm90
