// What the backward's plan promises, for every GPU it may meet and without one.
#include <cstdint>
#include <string>

#include "check.h"
#include "plan.h"

using namespace flash2;

namespace {

constexpr Device kDevices[] = {{80, 108, 166912, 167936},
                               {86, 72, 101376, 102400},
                               {89, 58, 101376, 102400},
                               {90, 132, 232448, 233472},
                               {120, 170, 101376, 102400}};
constexpr Device kH100 = kDevices[3];

void* address(std::uintptr_t bytes) { return reinterpret_cast<void*>(bytes); }

BackwardProblem problem(int32_t head_dim = 128, int32_t seq_q = 512, int32_t seq_kv = 512,
                        int32_t batch = 2, int32_t heads_q = 16, int32_t heads_kv = 16) {
  BackwardProblem p;
  p.query = p.key = p.value = p.out = p.dout = address(1 << 20);
  p.dquery = p.dkey = p.dvalue = address(2 << 20);
  p.lse = static_cast<const float*>(address(3 << 20));
  p.batch = batch;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.seq_q = seq_q;
  p.seq_kv = seq_kv;
  p.head_dim = p.head_dim_v = head_dim;
  const auto strides = [&](int64_t length, int64_t heads) {
    return Strides{length * heads * head_dim, heads * head_dim, head_dim};
  };
  p.query_stride = p.out_stride = p.dout_stride = p.dquery_stride = strides(seq_q, heads_q);
  p.key_stride = p.value_stride = p.dkey_stride = p.dvalue_stride = strides(seq_kv, heads_kv);
  return p;
}

std::string show(const Device& d, const BackwardProblem& p) {
  return "cc " + std::to_string(d.compute_capability) + ", head_dim " +
         std::to_string(p.head_dim) + ", lengths " + std::to_string(p.seq_q) + "/" +
         std::to_string(p.seq_kv);
}

void check_sound(const Device& d, const BackwardProblem& p) {
  const BackwardPlan plan = plan_backward(d, p);
  const std::string text = show(d, p) + ": " + describe(plan.status);
  CHECK(plan.status == PlanStatus::kOk, text);
  if (plan.status != PlanStatus::kOk) return;
  CHECK(plan.head_dim >= p.head_dim && plan.head_dim >= p.head_dim_v, text);
  CHECK(plan.smem_bytes <= static_cast<uint32_t>(d.smem_per_block),
        text << ", " << plan.smem_bytes << " bytes of shared memory");
  CHECK(static_cast<int64_t>(plan.tiles_kv) * plan.tile_kv >= p.seq_kv, text);
  CHECK(static_cast<int64_t>(plan.tiles_kv - 1) * plan.tile_kv < p.seq_kv, text);
  CHECK(plan.grid == static_cast<uint32_t>(plan.tiles_kv) * p.batch * p.heads_kv, text);
  CHECK(kRowPadding % plan.tile_q == 0, text << ", tiles of " << plan.tile_q << " rows");
  const BackwardWorkspace& w = plan.workspace;
  CHECK(plan.rows_grid * kRowPadding == w.rows_per_head * p.batch * p.heads_q, text);
  CHECK(w.rows_per_head >= p.seq_q && w.rows_per_head < p.seq_q + kRowPadding, text);
  for (int64_t part : {w.dquery, w.lse2, w.delta, w.turns, w.finished, w.ticket}) {
    CHECK(part % 16 == 0 && part < w.bytes, text << ", a part at " << part);
  }
}

void check_refused(const BackwardProblem& p, PlanStatus status) {
  const BackwardPlan plan = plan_backward(kH100, p);
  CHECK(plan.status == status, show(kH100, p) << ": expected '" << describe(status) << "', got '"
                                              << describe(plan.status) << "'");
}

}  // namespace

CASE(backward_fits_every_gpu) {
  for (const Device& d : kDevices) {
    for (int head_dim = 8; head_dim <= 256; head_dim += 8) check_sound(d, problem(head_dim));
  }
}

CASE(backward_covers_every_length) {
  for (const Device& d : kDevices) {
    for (int seq_q : {1, 63, 64, 65, 1000, 16384}) {
      for (int seq_kv : {1, 7, 64, 65, 129, 16384}) check_sound(d, problem(128, seq_q, seq_kv));
    }
  }
}

CASE(backward_workspace_is_linear_in_the_rows) {
  const BackwardWorkspace w = backward_workspace(3, 5, 100, 72, false);
  const int64_t rows = 3 * 5 * 128;
  CHECK(w.bytes == rows * (4 * 72 + 8) + 64 + 16, w.bytes);  // 15 heads, 16 bytes at a time
  const BackwardWorkspace turns = backward_workspace(3, 5, 100, 72, true);
  CHECK(turns.bytes == w.bytes + rows / 4, turns.bytes);
  CHECK(backward_workspace(1, 1024, 1 << 20, 256, true).bytes > int64_t{1} << 40, "");
}

CASE(backward_of_nothing_launches_only_what_writes) {
  CHECK(plan_backward(kH100, problem(128, 0, 512)).rows_grid == 0, "");
  CHECK(plan_backward(kH100, problem(128, 0, 512)).grid > 0, "");
  CHECK(plan_backward(kH100, problem(128, 512, 0)).rows_grid > 0, "");
  CHECK(plan_backward(kH100, problem(128, 512, 0)).grid == 0, "");
  const BackwardPlan none = plan_backward(kH100, problem(128, 512, 512, 0));
  CHECK(none.status == PlanStatus::kOk && none.grid == 0 && none.rows_grid == 0, "");
}

CASE(backward_refuses_what_the_forward_refuses) {
  check_refused(problem(12), PlanStatus::kHeadDim);
  check_refused(problem(128, 512, 512, 2, 16, 3), PlanStatus::kHeads);
  check_refused(problem(128, kMaxPosition + 1, 512, 1, 1, 1), PlanStatus::kTooLong);
  check_refused(problem(8, kMaxPosition, 1, 1 << 16, 1 << 4, 1), PlanStatus::kTooManyTiles);
}

CASE(backward_refuses_misaligned_arrays) {
  BackwardProblem p = problem();
  p.dout = address((2 << 20) + 8);
  check_refused(p, PlanStatus::kAlignment);
  p = problem();
  p.dkey_stride.row += 4;
  check_refused(p, PlanStatus::kAlignment);
}
