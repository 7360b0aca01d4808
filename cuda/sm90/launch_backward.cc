#include "sm90/launch_backward.h"

#include <cuda_runtime_api.h>

#include "launch.h"
#include "sm90/backward_kernels.h"
#include "sm90/backward_tiles.h"
#include "tensor_map.h"

namespace flash2::sm90 {
namespace {

int encode_maps(const BackwardParams& params, const BackwardTile& tile, BackwardMaps* maps) {
  const BackwardProblem& p = params.problem;
  const auto rows = [&](const void* data, const Strides& stride, int head_dim) {
    return Array{data, stride, p.batch, p.seq_q, p.heads_q, head_dim};
  };
  const auto keys = [&](const void* data, const Strides& stride, int head_dim) {
    return Array{data, stride, p.batch, p.seq_kv, p.heads_kv, head_dim};
  };
  const struct {
    Array array;
    int box_rows;
    CUtensorMap* map;
  } wanted[] = {
      {rows(p.query, p.query_stride, p.head_dim), tile.tile_q, &maps->query},
      {rows(p.dout, p.dout_stride, p.head_dim_v), tile.tile_q, &maps->dout},
      {keys(p.key, p.key_stride, p.head_dim), tile.keys(), &maps->key},
      {keys(p.value, p.value_stride, p.head_dim_v), tile.keys(), &maps->value},
      {keys(p.dkey, p.dkey_stride, p.head_dim), 64, &maps->dkey},
      {keys(p.dvalue, p.dvalue_stride, p.head_dim_v), 64, &maps->dvalue},
  };
  for (const auto& w : wanted) {
    if (int error = encode_tensor_map(w.array, p.data_type, w.box_rows, w.map)) return error;
  }
  const int64_t heads = int64_t{p.batch} * p.heads_q;
  if (int error =
          encode_row_map(params.lse2, heads, params.rows_per_head, tile.tile_q, &maps->lse2)) {
    return error;
  }
  if (int error =
          encode_row_map(params.delta, heads, params.rows_per_head, tile.tile_q, &maps->delta)) {
    return error;
  }
  if (!params.finish_inside) return cudaSuccess;
  const int64_t sums = heads * params.rows_per_head * p.head_dim;
  return encode_row_map(params.dquery_sums, sums / 256, 256, 256, &maps->sums,
                        tile.tile_q * tile.head_dim / 256);
}

}  // namespace

int launch_backward(const BackwardProblem& problem, const BackwardPlan& plan,
                    BackwardParams& params, CUstream_st* stream) {
  const bool bfloat16 = problem.data_type == DataType::kBFloat16;
  const void* kernel =
      find_kernel(problem.data_type, plan.head_dim, [&](auto head_dim, auto type) {
        return backward_kernel<head_dim(), type()>(plan.variant, plan.general);
      });
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  static SmemAllowance allowance;
  static_assert(2 * kBackwardTileCount <= 64);
  if (int error = allowance.ask(kernel, 2 * plan.variant + bfloat16, plan.smem_bytes)) {
    return error;
  }
  const BackwardTile& tile = kBackwardTiles[plan.variant];
  BackwardMaps maps = {};
  if (int error = encode_maps(params, tile, &maps)) return error;

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(tile.blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.grid);
  config.blockDim = dim3(plan.block);
  config.dynamicSmemBytes = plan.smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = tile.blocks == 1 ? 1 : 2;
  void* arguments[] = {&maps, &params};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace flash2::sm90
