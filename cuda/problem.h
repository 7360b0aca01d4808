// What one call asks for: plain facts and device pointers, nothing derived.
//
// Arrays are [batch, length, heads, head_dim] with head_dim contiguous and every other axis given
// by a stride in elements, so that no operand is ever transposed or repeated. A stride of 0
// broadcasts. A null pointer means that the feature is absent.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FLASH2_HOST_DEVICE __host__ __device__
#else
#define FLASH2_HOST_DEVICE
#endif

namespace flash2 {

enum class DataType : int32_t { kFloat16 = 0, kBFloat16 = 1 };

// A window side without bound.
inline constexpr int32_t kUnbounded = -1;
// Lengths, offsets and window sides stay below this, so that sums of three fit an int32.
inline constexpr int32_t kMaxPosition = (1 << 29) - 1;

struct Strides {
  int64_t batch = 0;
  int64_t row = 0;
  int64_t head = 0;
};

// [begin, end); empty where end <= begin. Read at once.
struct alignas(8) Interval {
  int32_t begin;
  int32_t end;
};

// One value per batch entry; `stride` 0 where one value serves all.
template <class T>
struct PerBatch {
  const T* data = nullptr;
  int64_t stride = 0;

  FLASH2_HOST_DEVICE const T* row(int batch) const { return data + batch * stride; }
  FLASH2_HOST_DEVICE T at(int batch) const { return *row(batch); }
};

// One float per batch entry and query head.
struct PerHead {
  const float* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;

  FLASH2_HOST_DEVICE float at(int batch, int head) const {
    return data[batch * batch_stride + head * head_stride];
  }
};

// What forward and backward have in common.
struct Problem {
  const void* query = nullptr;  // [batch, seq_q, heads_q, head_dim]
  const void* key = nullptr;    // [batch, seq_kv, heads_kv, head_dim]
  const void* value = nullptr;  // [batch, seq_kv, heads_kv, head_dim_v]

  Strides query_stride;
  Strides key_stride;
  Strides value_stride;

  DataType data_type = DataType::kBFloat16;
  int32_t batch = 0;
  int32_t heads_q = 0;
  int32_t heads_kv = 0;  // divides heads_q
  int32_t seq_q = 0;
  int32_t seq_kv = 0;
  int32_t head_dim = 0;    // a multiple of 8, at most 256
  int32_t head_dim_v = 0;  // likewise

  // score = scale * q.k, times the operand where there is one.
  float scale = 1.0f;
  PerBatch<float> scale_operand;
  float soft_cap = 0.0f;  // c of c * tanh(x / c); 0: none
  PerHead alibi_slopes;   // score -= slope * |i - j|
  PerHead sinks;          // joins the denominator; of no concern to the backward

  // Query row r stands at position i = r + query_offset, plus the operand where there is one.
  int32_t query_offset = 0;
  PerBatch<int32_t> query_offset_operand;

  // Visibility, all joined by AND.
  bool is_causal = false;             // j <= i, or j < prefix
  int32_t window_left = kUnbounded;   // i - left <= j
  int32_t window_right = kUnbounded;  // j <= i + right
  int32_t chunk_size = 0;             // j // chunk == i // chunk; 0: none
  PerBatch<int32_t> prefix_lengths;
  PerBatch<int32_t> query_seq_lengths;
  PerBatch<int32_t> key_value_seq_lengths;
  // Segment ids, [batch, length], given together or not at all; `stride` steps the batch.
  PerBatch<int32_t> query_segment_ids;
  PerBatch<int32_t> key_value_segment_ids;

  // What the segments alone let see, where they are packed; a launch of the sm90 family sets these
  // (segment_intervals.cu). [batch, seq_q]: the keys with a row's id. [batch, seq_kv]: the rows
  // with a key's id.
  const Interval* row_keys = nullptr;
  const Interval* key_rows = nullptr;
  // None of so many is 0: ids are packed, and kernels of the sm90 family do the work. Else those
  // of sm80 do it. Null: whoever is launched does.
  const int32_t* packed = nullptr;
  int32_t packed_count = 0;
};

struct ForwardProblem : Problem {
  void* out = nullptr;   // [batch, seq_q, heads_q, head_dim_v]
  float* lse = nullptr;  // [batch, heads_q, seq_q], contiguous, natural log; may be null
  Strides out_stride;
};

struct BackwardProblem : Problem {
  const void* out = nullptr;    // [batch, seq_q, heads_q, head_dim_v], the forward's
  const void* dout = nullptr;   // its cotangent, likewise
  const float* lse = nullptr;   // [batch, heads_q, seq_q], contiguous, natural log
  const float* dlse = nullptr;  // its cotangent, likewise; null: zero
  Strides out_stride;
  Strides dout_stride;

  void* dquery = nullptr;  // [batch, seq_q, heads_q, head_dim]
  void* dkey = nullptr;    // [batch, seq_kv, heads_kv, head_dim]
  void* dvalue = nullptr;  // [batch, seq_kv, heads_kv, head_dim_v]
  Strides dquery_stride;
  Strides dkey_stride;
  Strides dvalue_stride;

  // [batch, heads_q, seq_q], contiguous: what each query row adds to the gradient of the scale
  // operand, over the problem's own factor; null: not wanted.
  float* dscale_rows = nullptr;

  bool deterministic = false;  // the same bytes on every run
};

}  // namespace flash2
