// What happens in registers between the products of the backward.
//
// Scores are transposed: of each 64 keys x 8 queries block j a thread holds
// s[4 j + 2 r + i] = key 16 warp + 8 r + lane / 4, query 8 j + 2 (lane % 4) + i. Logsumexps and
// deltas are therefore per column.
#pragma once

#include <cstdint>

#include "backward_rows.h"
#include "mask.cuh"
#include "problem.h"
#include "ptx/common.cuh"
#include "ptx/warpgroup.cuh"
#include "softmax.cuh"

namespace flash2::sm90 {

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

// The same value, of which the compiler knows that all lanes have it: loops over it and what is
// derived from it stay in uniform registers, and no wgmma waits for a move of its descriptor.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

__device__ __forceinline__ uint4 words_of(float a, float b, float c, float d) {
  return {__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)};
}

// What the columns of a thread have beside them, logsumexps or deltas: of[j] of queries
// 8 j + 2 (lane % 4) and the next.
template <int kBlocks>
__device__ __forceinline__ void load_columns(float2 (&of)[kBlocks], uint32_t from) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    of[j] = ptx::load_shared_8(from + threadIdx.x % 4 * 8 + j * 32);
  }
}

// P^T from S^T, both in place; times 2^kProbabilityExponent, which is inside the logsumexps.
template <int kRegisters>
__device__ __forceinline__ void to_probabilities(float (&s)[kRegisters],
                                                 const float2 (&lse2)[kRegisters / 4],
                                                 float factor) {
#pragma unroll
  for (int j = 0; j < kRegisters / 4; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      s[4 * j + 2 * r] = ptx::exp2(fmaf(s[4 * j + 2 * r], factor, -lse2[j].x));
      s[4 * j + 2 * r + 1] = ptx::exp2(fmaf(s[4 * j + 2 * r + 1], factor, -lse2[j].y));
    }
  }
}

// With a soft cap c a score x becomes c tanh(x / c) = 2 c v - c with v = 1 / (1 + exp(-2 x / c)),
// whose derivative is 4 v (1 - v).
struct SoftCap {
  float gain;    // -2 / c, of raw scores, to base 2
  float factor;  // 2 c, to base 2

  __device__ __forceinline__ SoftCap(float cap, float scale)
      : gain(-2.0f * kLog2E * scale / cap), factor(2.0f * kLog2E * cap) {}
};

// P^T from S^T as A operands of k16 steps, and P^T times the cap's derivative, of which dS^T is
// made: in float16 whatever the type, which fits the scaled P best. Both take the registers that
// S^T had.
template <DataType kType, int kRegisters>
__device__ __forceinline__ void to_capped(const float (&s)[kRegisters],
                                          float2 (&lse2)[kRegisters / 4], const SoftCap& cap,
                                          uint32_t (&probabilities)[kRegisters / 8][4],
                                          uint32_t (&sloped)[kRegisters / 8][4]) {
#pragma unroll
  for (int j = 0; j < kRegisters / 4; ++j) {
    const float base[2] = {lse2[j].x + 0.5f * cap.factor, lse2[j].y + 0.5f * cap.factor};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float prob[2], slope[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float v = ptx::reciprocal(1.0f + ptx::exp2(s[4 * j + 2 * r + i] * cap.gain));
        prob[i] = ptx::exp2(fmaf(v, cap.factor, -base[i]));
        slope[i] = prob[i] * fmaf(-4.0f * v, v, 4.0f * v);
      }
      probabilities[j / 2][j % 2 * 2 + r] = ptx::pack<kType>(prob[0], prob[1]);
      sloped[j / 2][j % 2 * 2 + r] = ptx::pack_positive(slope[0], slope[1]);
    }
  }
}

// A number that depends on all of them.
template <int kRegisters>
__device__ __forceinline__ uint32_t bits_of(const float (&s)[kRegisters]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) bits |= __float_as_uint(s[i]);
  return bits;
}
template <int kSteps>
__device__ __forceinline__ uint32_t bits_of(const uint32_t (&words)[kSteps][4]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) bits |= words[i / 4][i % 4];
  return bits;
}

// Which queries of a step see the two keys of a thread. Element s[4 j + 2 r + i] has bit
// j % 8 + 8 i + 16 (j / 8) of of[r]: so two neighbours have bytes of their own, and one shift
// brings both bits to the top of these. `key` is the first key, `row0` the first query.
template <class Tile>
__device__ __forceinline__ void find_visible(uint32_t (&of)[2], const Problem& p, const Tile& tile,
                                             int key, int row0) {
  const int column = row0 + threadIdx.x % 4 * 2;
  // Of the thread's queries, 8 j + i behind the first, those below `end`.
  const auto below = [&](int end) {
    const auto ones = [](int queries) { return (1u << min(max((queries + 7) / 8, 0), 16)) - 1; };
    return __byte_perm(ones(end - column), ones(end - column - 1), 0x5140);
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Interval rows = tile.rows_of(p, key + 8 * r);
    const bool exists = key + 8 * r < tile.visibility.kv_length;
    // Made here and once: spread over what follows, at head_dim 64 there is C7511.
    of[r] = ptx::opaque(exists ? below(rows.end) & ~below(rows.begin) : 0);
  }
}

// Zeros where a row does not see a key. Probabilities and not scores: a scale may be negative or
// 0.
template <int kRegisters>
__device__ __forceinline__ void mask_probabilities(float (&s)[kRegisters],
                                                   const uint32_t (&visible)[2]) {
#pragma unroll
  for (int j = 0; j < kRegisters / 4; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!(visible[r] >> (j % 8 + 8 * i + 16 * (j / 8)) & 1)) s[4 * j + 2 * r + i] = 0.0f;
      }
}

// The same of an operand of k16 steps.
template <int kSteps>
__device__ __forceinline__ void mask_operand(uint32_t (&words)[kSteps][4],
                                             const uint32_t (&visible)[2]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int j = 2 * k + w / 2;
      // Each half of the word is a byte's top bit, again and again.
      words[k][w] &= ptx::permute_bytes(visible[w % 2] << (7 - j % 8), j < 8 ? 0x9988 : 0xbbaa);
    }
}

// dS^T = P^T (dP^T - delta), packed as A operands of k16 steps. It loses the factor that P has;
// deltas have it already.
template <DataType kType, int kRegisters>
__device__ __forceinline__ void to_dscores(const float (&s)[kRegisters],
                                           const float (&dp)[kRegisters],
                                           const float2 (&delta)[kRegisters / 4],
                                           uint32_t (&ds)[kRegisters / 8][4]) {
#pragma unroll
  for (int j = 0; j < kRegisters / 4; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int e = 4 * j + 2 * r;
      ds[j / 2][j % 2 * 2 + r] =
          ptx::pack<kType>(s[e] * fmaf(dp[e], kProbabilityUnit, -delta[j].x),
                           s[e + 1] * fmaf(dp[e + 1], kProbabilityUnit, -delta[j].y));
    }
  }
}

// The same from what `to_capped` has left of P^T.
template <DataType kType, int kRegisters>
__device__ __forceinline__ void to_dscores(const uint32_t (&sloped)[kRegisters / 8][4],
                                           const float (&dp)[kRegisters],
                                           const float2 (&delta)[kRegisters / 4],
                                           uint32_t (&ds)[kRegisters / 8][4]) {
#pragma unroll
  for (int j = 0; j < kRegisters / 4; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int e = 4 * j + 2 * r;
      const float2 p = ptx::unpack<DataType::kFloat16>(sloped[j / 2][j % 2 * 2 + r]);
      ds[j / 2][j % 2 * 2 + r] =
          ptx::pack<kType>(p.x * fmaf(dp[e], kProbabilityUnit, -delta[j].x),
                           p.y * fmaf(dp[e + 1], kProbabilityUnit, -delta[j].y));
    }
  }
}

// Packs 64 keys x 8 kRegisters / 4 queries as A operands of k16 steps.
template <DataType kType, int kRegisters>
__device__ __forceinline__ void pack_all(const float (&s)[kRegisters],
                                         uint32_t (&a)[kRegisters / 8][4]) {
#pragma unroll
  for (int i = 0; i < kRegisters / 2; ++i) {
    a[i / 4][i % 4] = ptx::pack<kType>(s[2 * i], s[2 * i + 1]);
  }
}

// Where a lane's row of a transposed 64 keys x 16 queries store goes: rows are queries, and the
// 64 keys of a panel are their 128 bytes. The next 16 queries lie 2048 bytes on.
__device__ __forceinline__ uint32_t transposed_row(uint32_t panel, int warp, int lane) {
  const uint32_t row = lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
  return panel + row * 128 + (chunk ^ row % 8) * 16;
}

// 64 rows of a gradient times `factor` into panels of 64 columns, `pitch` bytes apart.
template <DataType kType, int kD>
__device__ __forceinline__ void store_rows(const float (&sum)[kD / 2], uint32_t panels, int pitch,
                                           int warp, int lane, float factor) {
  const int row = warp * 16 + lane % 8 + lane / 8 % 2 * 8;
#pragma unroll
  for (int j = 0; j < kD / 16; ++j) {
    const int chunk = 2 * j + lane / 16;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = ptx::pack<kType>(sum[8 * j + 2 * i] * factor, sum[8 * j + 2 * i + 1] * factor);
    }
    ptx::store_matrix_x4(panels + chunk / 8 * pitch + row * 128 + ((chunk ^ row) % 8) * 16, words);
  }
}

}  // namespace flash2::sm90
