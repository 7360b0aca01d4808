// The backward's plan: see plan.h.

#include <algorithm>
#include <cstdint>

#include "plan.h"
#include "problem.h"
#include "sm80/tiles.h"
#include "sm90/choose_backward.h"

namespace flash2 {
namespace {

using sm80::BackwardTile;
using sm80::kBackwardTileCount;
using sm80::kBackwardTiles;

// Sums of dQ that a key head's last block may turn into dQ alone: at 2 MB it takes some 20 us for
// what a kernel of its own takes 70 us for.
constexpr int64_t kFinishBytes = int64_t{2} << 20;

// The first tile of the bucket that fits.
int choose_tile(const Device& device, int bucket) {
  for (int i = 0; i < kBackwardTileCount; ++i) {
    const BackwardTile& tile = kBackwardTiles[i];
    if (tile.head_dim == bucket && tile.smem_bytes() <= device.smem_per_block) return i;
  }
  return -1;
}

void choose_sm80_tile(const Device& device, const BackwardProblem& p, BackwardPlan* plan) {
  plan->variant = choose_tile(device, plan->head_dim);
  if (plan->variant < 0) {
    plan->status = PlanStatus::kDeviceTooOld;
    return;
  }
  const BackwardTile& tile = kBackwardTiles[plan->variant];
  plan->general = is_general(p);
  plan->tile_q = tile.tile_q;
  plan->tile_kv = tile.tile_kv();
  plan->stages = tile.stages;
  plan->block = tile.threads();
  plan->smem_bytes = tile.smem_bytes();
}

}  // namespace

BackwardWorkspace backward_workspace(int64_t batch, int64_t heads_q, int64_t seq_q,
                                     int64_t head_dim, int64_t seq_kv, bool segments) {
  BackwardWorkspace w;
  const int64_t padding = head_dim == 128 && seq_q >= kLongRows ? kLongHeadPadding : kHeadPadding;
  w.rows_per_head = (seq_q + padding - 1) / padding * padding;
  const int64_t rows = batch * heads_q * w.rows_per_head;
  w.lse2 = w.dquery + rows * head_dim * 4;
  w.delta = w.lse2 + rows * 4;
  w.turns = w.delta + rows * 4;
  w.finished = w.turns + rows / 4;
  w.ticket = w.finished + (batch * heads_q * 4 + 15) / 16 * 16;
  w.segments = w.ticket + 16;
  w.bytes = w.segments + (segments ? segment_workspace(batch, seq_q, seq_kv).bytes : 0);
  return w;
}

BackwardPlan plan_backward(const Device& device, const BackwardProblem& p, int32_t family) {
  BackwardPlan plan;
  plan.status = check_problem(device, p);
  if (plan.status != PlanStatus::kOk) return plan;
  if (!is_aligned(p.out, p.out_stride, p.batch, p.seq_q, p.heads_q) ||
      !is_aligned(p.dout, p.dout_stride, p.batch, p.seq_q, p.heads_q) ||
      !is_aligned(p.dquery, p.dquery_stride, p.batch, p.seq_q, p.heads_q) ||
      !is_aligned(p.dkey, p.dkey_stride, p.batch, p.seq_kv, p.heads_kv) ||
      !is_aligned(p.dvalue, p.dvalue_stride, p.batch, p.seq_kv, p.heads_kv)) {
    plan.status = PlanStatus::kAlignment;
    return plan;
  }
  plan.head_dim = bucket(p);
  if (family != 80 && sm90::serves(device, p)) {
    sm90::choose_tile(p, &plan);
  } else {
    choose_sm80_tile(device, p, &plan);
  }
  if (plan.status != PlanStatus::kOk) return plan;
  plan.workspace = backward_workspace(p.batch, p.heads_q, p.seq_q, p.head_dim, p.seq_kv,
                                      p.query_segment_ids.data != nullptr);

  const int64_t heads = int64_t{p.batch} * p.heads_kv;
  plan.tiles_kv = (p.seq_kv + plan.tile_kv - 1) / plan.tile_kv;
  const int64_t tiles = heads * plan.tiles_kv;
  const int64_t row_blocks =
      int64_t{p.batch} * p.heads_q * (plan.workspace.rows_per_head / kRowPadding);
  if (std::max({int64_t{p.batch} * p.heads_q, 2 * tiles, row_blocks}) > INT32_MAX) {
    plan.status = PlanStatus::kTooManyTiles;
    return plan;
  }
  plan.grid = static_cast<uint32_t>(plan.family == 90 ? sm90::grid(device, plan, tiles) : tiles);
  plan.rows_grid = static_cast<uint32_t>(row_blocks);
  if (plan.family == 90 && p.query_segment_ids.data) {
    plan.otherwise.push_back(plan_backward(device, p, 80));
    BackwardPlan& otherwise = plan.otherwise.front();
    otherwise.finish_inside = false;  // the kernel afterwards serves both
    if (otherwise.status != PlanStatus::kOk) {
      plan.status = otherwise.status;
      return plan;
    }
  }
  plan.finish_inside = plan.family == 90 ? sm90::finishes_inside(p, plan)
                                         : tiles > 0 && 4 * int64_t{p.seq_q} * p.head_dim *
                                                                p.heads_q / p.heads_kv <=
                                                            kFinishBytes;

  const bool uneven = is_uneven(p), hopper = plan.family == 90;
  // Where tiles are not equally long, or on Hopper wait for their turn.
  if (tiles > 0 && (uneven || (hopper && p.deterministic))) {
    // Of Q, dO and the sums of dQ.
    const int64_t bytes =
        int64_t{p.seq_q} * (6 * p.head_dim + 2 * p.head_dim_v) * p.heads_q / p.heads_kv;
    plan.section = heads_in_cache(bytes, heads);
    if (hopper) plan.section = sm90::section(device, p, plan, heads, plan.section);
    if (hopper && uneven) {
      const bool grouped = p.heads_q > p.heads_kv;
      // Where tiles wait for others the second round had better not come together, except of
      // groups, whose Q, dO and sums no cache would hold otherwise. (Pairs that wait for the first
      // tile, not for their turn, lose nothing by it.)
      const bool waits = p.deterministic || (plan.first_stores && plan.head_dim < 256);
      if (!waits || grouped) plan.round = sm90::round(device, plan);
      plan.sections_turn = grouped && !p.deterministic && sm90::few_tiles(device, plan);
    }
  }
  return plan;
}

}  // namespace flash2
