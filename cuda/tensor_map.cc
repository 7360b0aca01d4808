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

// Of 16-bit numbers, in boxes of 64 columns. Strides, in elements, of axes after the first.
template <int kAxes>
int encode_swizzled(const void* data, DataType type, const cuuint64_t (&sizes)[kAxes],
                    const int64_t (&strides)[kAxes - 1], const cuuint32_t (&box)[kAxes],
                    CUtensorMap* map,
                    CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  const auto encode = encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  // Strides of axes of one entry mean nothing, but are checked: 16 bytes stand in.
  cuuint64_t bytes[kAxes - 1];
  cuuint32_t steps[kAxes] = {1};
  for (int i = 1; i < kAxes; ++i) {
    bytes[i - 1] = sizes[i] == 1 ? 16 : static_cast<cuuint64_t>(strides[i - 1]) * kElementBytes;
    steps[i] = 1;
  }
  const CUresult result = encode(map,
                                 type == DataType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                 kAxes, const_cast<void*>(data), sizes, bytes, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cuuint64_t batch_size(const Array& array) { return array.stride.batch == 0 ? 1 : array.batch; }

}  // namespace

int encode_tensor_map(const Array& a, DataType type, int rows, CUtensorMap* map, bool once) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(a.head_dim),
                               static_cast<cuuint64_t>(a.length), static_cast<cuuint64_t>(a.heads),
                               batch_size(a)};
  const int64_t strides[3] = {a.stride.row, a.stride.head, a.stride.batch};
  const cuuint32_t box[4] = {kBoxColumns, static_cast<cuuint32_t>(rows), 1, 1};
  const bool narrow = once && a.head_dim <= kBoxColumns;
  return encode_swizzled<4>(
      a.data, type, sizes, strides, box, map,
      narrow ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

int encode_pack_map(const Array& a, DataType type, int group, int pack, int rows,
                    CUtensorMap* map) {
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(a.head_dim), static_cast<cuuint64_t>(group),
                               static_cast<cuuint64_t>(a.length),
                               static_cast<cuuint64_t>(a.heads / group), batch_size(a)};
  const int64_t strides[4] = {a.stride.head, a.stride.row, group * a.stride.head, a.stride.batch};
  const cuuint32_t box[5] = {kBoxColumns, static_cast<cuuint32_t>(pack),
                             static_cast<cuuint32_t>(rows), 1, 1};
  return encode_swizzled<5>(a.data, type, sizes, strides, box, map);
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
