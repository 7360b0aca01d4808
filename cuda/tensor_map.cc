#include "tensor_map.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash2 {
namespace {

constexpr int kElementBytes = 2;
constexpr int kBoxColumns = 64;
constexpr int kFirstCuda = 12000;  // the driver interface that has the encoder

// The driver's encoder, asked for once: the module does not link the driver. Null without one.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, kFirstCuda, cudaEnableDefault, &result);
    const bool ok = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
  }();
  return found;
}

}  // namespace

int encode_tensor_map(const Array& array, DataType type, int rows, CUtensorMap* map) {
  const auto encode = encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const bool broadcast = array.stride.batch == 0;
  const cuuint64_t sizes[4] = {
      static_cast<cuuint64_t>(array.head_dim), static_cast<cuuint64_t>(array.length),
      static_cast<cuuint64_t>(array.heads), broadcast ? 1 : static_cast<cuuint64_t>(array.batch)};
  // Strides of axes of one entry mean nothing, but are checked: 16 bytes stand in.
  const int64_t strides[3] = {array.stride.row, array.stride.head, array.stride.batch};
  cuuint64_t bytes[3];
  for (int i = 0; i < 3; ++i) {
    bytes[i] = sizes[i + 1] == 1 ? 16 : static_cast<cuuint64_t>(strides[i]) * kElementBytes;
  }
  const cuuint32_t box[4] = {kBoxColumns, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map,
             type == DataType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             4, const_cast<void*>(array.data), sizes, bytes, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

int encode_row_map(const float* data, int64_t heads, int64_t length, int rows, CUtensorMap* map,
                   int box_heads) {
  const auto encode = encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(length), static_cast<cuuint64_t>(heads)};
  const cuuint64_t bytes[1] = {sizes[0] * sizeof(float)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(rows), static_cast<cuuint32_t>(box_heads)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, const_cast<float*>(data), sizes, bytes, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace flash2
