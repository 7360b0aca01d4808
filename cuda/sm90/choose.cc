#include "sm90/choose.h"

#include "sm90/tiles.h"

namespace flash2::sm90 {
namespace {

bool has_masks(const ForwardProblem& p) {
  return p.is_causal || p.window_left != kUnbounded || p.window_right != kUnbounded ||
         p.chunk_size > 0 || p.query_seq_lengths.data || p.key_value_seq_lengths.data;
}

}  // namespace

bool serves(const Device& device, const ForwardProblem& p) {
  const bool general = p.soft_cap > 0.0f || p.alibi_slopes.data || p.query_segment_ids.data;
  // A tensor map has no empty axis.
  return device.compute_capability == 90 && !general && p.seq_kv > 0;
}

void choose_tile(const ForwardProblem& p, ForwardPlan* plan) {
  plan->family = 90;
  const bool masked = has_masks(p);
  for (int i = 0; i < kForwardTileCount; ++i) {
    const ForwardTile& tile = kForwardTiles[i];
    if (tile.head_dim != plan->head_dim || tile.masked != masked) continue;
    plan->variant = i;
    if (p.seq_q <= kShort) break;
  }
  const ForwardTile& tile = kForwardTiles[plan->variant];
  plan->tile_q = tile.tile_q();
  plan->tile_kv = tile.tile_kv;
  plan->stages = tile.stages();
  plan->block = tile.threads();
  plan->smem_bytes = tile.smem_bytes();
}

bool counts_tiles(const ForwardPlan& plan) { return kForwardTiles[plan.variant].masked; }

}  // namespace flash2::sm90
