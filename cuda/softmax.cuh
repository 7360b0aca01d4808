// The online softmax of the rows that one thread holds, and the rule for a row that sees no key.
//
// Scores stay as q.k; scale * log2(e) is folded into the exponential's fused multiply-add. It must
// not be negative (the caller flips the query's sign instead) nor zero (`score_factor`).
#pragma once

#include <cstdint>

#include "ptx/common.cuh"

namespace flash2 {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// |scale| * log2(e). With a scale of 0 a masked score would give -inf * 0 = NaN: the smallest
// factor stands in for it, under which every finite score still gives exp2(0) = 1.
__device__ __forceinline__ float score_factor(float scale) {
  const float factor = fabsf(scale) * kLog2E;
  return factor == 0.0f ? 1e-37f : factor;
}

// cap * tanh(x / cap). The hardware's tanh is too coarse: its error of 2^-11 would be multiplied
// by cap.
__device__ __forceinline__ float cap_score(float x, float cap) {
  return cap - __fdividef(2.0f * cap, 1.0f + ptx::exp2(x * (2.0f * kLog2E / cap)));
}

// A row's exponentials subtract not its maximum but a value that may lag behind it, so that output
// and sum are seldom rescaled; at most by 2^8, which harms neither float16 nor float32. The
// maximum's own probability, which is 1 without a lag, is rounded to 16 bits with it. In a row
// that sees one key nearly alone that would be most of the gradients' error (delta takes it
// there), so the value lags only while the row's sum is no less than that probability: a key that
// makes up more than half of its row has a probability of exactly 1.
inline constexpr float kMaxLag = 8.0f;

template <int kRows>
struct OnlineSoftmax {
  float max[kRows];  // of the raw scores seen so far, or behind it (`kMaxLag`); -inf: none seen
  float sum[kRows];  // of this thread's columns only; joined over the quad by `finish`

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      max[r] = -INFINITY;
      sum[r] = 0.0f;
    }
  }

  // Takes the largest score of this thread's columns per row, of rows that have seen no key yet.
  __device__ __forceinline__ void begin(const float (&largest)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) max[r] = of_quad(largest[r]);
  }

  // The same of rows that may have. Calls rescale(row, decay) with what
  // the row's output must be multiplied by, if a row of the warp has to move; no row's numbers
  // depend on another row's.
  template <class Rescale>
  __device__ __forceinline__ void raise(const float (&largest)[kRows], float factor,
                                        Rescale rescale) {
    float m[kRows];
    bool wanted[kRows];
    bool any = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      m[r] = of_quad(largest[r]);
      wanted[r] = wants_to_move(r, m[r], factor);
      any |= wanted[r];
    }
    if (!__any_sync(~0u, any)) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const uint32_t quad = __ballot_sync(~0u, wanted[r]) >> (threadIdx.x & 28) & 15;
      const float next = quad != 0 ? m[r] : max[r];
      const float decay = ptx::exp2(base_of(max[r], factor) - base_of(next, factor));  // or 1
      max[r] = next;
      sum[r] *= decay;
      rescale(r, decay);
    }
  }

  static __device__ __forceinline__ float of_quad(float largest) {
    const float m = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    return fmaxf(m, __shfl_xor_sync(~0u, m, 2));
  }
  // By this thread's part of the sum, times 4: the row moves if any of its four threads wants it
  // to, so all of them have seen at least as much. False where m and max are -inf.
  __device__ __forceinline__ bool wants_to_move(int row, float m, float factor) const {
    const float lag = fminf(fmaxf(ptx::log2(sum[row]) + 2.0f, 0.0f), kMaxLag);
    return fmaf(m, factor, -max[row] * factor) > lag;
  }
  // What the row's exponentials subtract.
  __device__ __forceinline__ float base(int row, float factor) const {
    return base_of(max[row], factor);
  }
  // A row that has seen no key yet: subtract something finite, so that exp2(-inf - base) is 0 and
  // not NaN.
  static __device__ __forceinline__ float base_of(float max, float factor) {
    return fmaxf(max * factor, -3e38f);
  }

  // Joins the quad's sums. `visible` false, or no key seen: the empty-row rule, output 0 and
  // logsumexp -inf (the sink's logit if there is one). Returns what the output is multiplied by;
  // 0 means that it is 0 whatever the accumulator holds. Without branches, but for the sink, so
  // that the chains of a thread's rows run side by side; the approximations are within 2^-22.
  __device__ __forceinline__ float finish(int row, bool visible, float factor, bool has_sink,
                                          float sink, float* lse) {
    float total = sum[row];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const bool empty = !visible || total == 0.0f;
    float shift = base(row, factor);
    float keys = 1.0f;
    if (has_sink) {
      const float sink2 = sink * kLog2E;
      const float top = fmaxf(shift, sink2);
      keys = ptx::exp2(shift - top);
      total = total * keys + ptx::exp2(sink2 - top);
      shift = top;
    }
    *lse = (shift + ptx::log2(total)) * kLn2;
    if (empty) *lse = has_sink ? sink : -INFINITY;
    return empty ? 0.0f : __fdividef(keys, total);
  }
};

}  // namespace flash2
