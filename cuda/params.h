// What the kernels receive: the problem, and what the plan adds to it.
#pragma once

#include <cstdint>

#include "plan.h"
#include "problem.h"

namespace flash2 {

// Division of numbers below 2^31 by a number known on the host: a multiplication and a shift in
// place of some 25 dependent instructions, of which a block would have five in a row before its
// first copy.
struct Divisor {
  uint32_t value;
  uint32_t multiplier;
  uint32_t shift;

  explicit Divisor(uint32_t divisor) : value(divisor), multiplier(0), shift(0) {
    while (shift < 31 && (uint32_t{1} << shift) < divisor) ++shift;
    const uint64_t rest = (uint64_t{1} << shift) - divisor;
    multiplier = static_cast<uint32_t>((rest << 32) / divisor + 1);
  }
#ifdef __CUDACC__
  // For an n that is the same in all lanes. The shuffle tells the compiler so, which then keeps
  // what follows from it in uniform registers: the main loop has no others to spare.
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return __shfl_sync(~0u, (__umulhi(n, multiplier) + n) >> shift, 0);
  }
#endif
};

struct ForwardParams {
  ForwardProblem problem;
  uint32_t tiles_q;  // tiles per pack of heads (of one head, but where the plan packs them)
  uint32_t all_packs;
  Divisor section;  // packs that are walked together: scheduler.cuh
  Divisor section_tiles;
  uint32_t last_section;  // ForwardPlan
  Divisor packs;          // per batch entry
  Divisor group;          // packs per key head
};

inline ForwardParams make_params(const ForwardProblem& problem, const ForwardPlan& plan) {
  const uint32_t tiles_q = plan.tiles_q, section = plan.section, packs = plan.packs;
  return {problem,
          tiles_q,
          problem.batch * packs,
          Divisor(section),
          Divisor(section * tiles_q),
          static_cast<uint32_t>(plan.last_section),
          Divisor(packs),
          Divisor(packs / problem.heads_kv)};
}

struct BackwardParams {
  BackwardProblem problem;
  // The workspace: BackwardWorkspace has the shapes.
  float* dquery_sums;
  float* lse2;
  float* delta;
  // Null where nobody waits for others: sm80 unless deterministic.
  int32_t* turns;
  int32_t* finished;
  int32_t* ticket;
  // The first key tile of a row block stores its sums of dQ, and nobody writes zeros before.
  bool first_stores;
  bool transposed_sums;  // dquery_sums.cuh
  bool finish_inside;    // the main kernel makes dQ from its sums, as soon as they are complete
  uint32_t rows_per_head;
  uint32_t tiles_kv;  // tiles per key head
  uint32_t heads;     // batch * heads_kv
  Divisor section;
  Divisor section_tiles;
  Divisor heads_kv;
  Divisor row_blocks;  // kRowPadding rows each, per query head
  Divisor heads_q;
  Divisor round;       // of key tiles at work at once
  bool sections_turn;  // BackwardPlan
  int32_t group;       // query heads per key head
  uint32_t zero = 0;   // the compiler does not know
};

}  // namespace flash2
