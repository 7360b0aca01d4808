#include "sm90/choose.h"

#include <algorithm>
#include <cstdint>

#include "sm90/tiles.h"

namespace flash2::sm90 {
namespace {

bool has_masks(const ForwardProblem& p) {
  return p.is_causal || p.window_left != kUnbounded || p.window_right != kUnbounded ||
         p.chunk_size > 0 || p.query_seq_lengths.data || p.key_value_seq_lengths.data;
}

// The first tile of the bucket that packs heads, or the one that serves the problem without.
int find_tile(const ForwardProblem& p, int32_t head_dim, bool packs) {
  const bool masked = has_masks(p);
  int found = -1;
  for (int i = 0; i < kForwardTileCount; ++i) {
    const ForwardTile& tile = kForwardTiles[i];
    if (tile.head_dim != head_dim || (packs ? !tile.packs() : tile.masked != masked)) continue;
    found = i;
    if (packs || p.seq_q <= kShort) break;
  }
  return found;
}

// How many heads of a group share a tile: what makes fewest tiles, if that saves an eighth of
// them. Depends on no batch size: a row is summed alike in all of them.
int32_t choose_pack(const ForwardProblem& p, int32_t tile_q, int32_t packed_tile_q) {
  if (p.heads_q == p.heads_kv) return 1;
  const auto tiles = [&](int32_t pack, int32_t rows) {
    return packs_of_heads(p, pack) * tiles_of_pack(p, pack, rows);
  };
  int32_t best = 1;
  int64_t fewest = tiles(1, tile_q) * 7 / 8 + 1;
  for (int32_t pack = 2; pack <= kMostPackedHeads && pack / 2 < p.heads_q / p.heads_kv;
       pack *= 2) {
    if (tiles(pack, packed_tile_q) >= fewest) continue;
    fewest = tiles(pack, packed_tile_q);
    best = pack;
  }
  return best;
}

}  // namespace

bool serves(const Device& device, const ForwardProblem& p) {
  const bool general = p.soft_cap > 0.0f || p.alibi_slopes.data || p.query_segment_ids.data;
  // A tensor map has no empty axis.
  return device.compute_capability == 90 && !general && p.seq_kv > 0;
}

void choose_tile(const ForwardProblem& p, ForwardPlan* plan) {
  plan->family = 90;
  plan->variant = find_tile(p, plan->head_dim, false);
  const int packing = find_tile(p, plan->head_dim, true);
  plan->pack =
      choose_pack(p, kForwardTiles[plan->variant].tile_q(), kForwardTiles[packing].tile_q());
  if (plan->pack > 1) plan->variant = packing;
  const ForwardTile& tile = kForwardTiles[plan->variant];
  plan->tile_q = tile.tile_q();
  plan->tile_kv = tile.tile_kv;
  plan->stages = tile.stages();
  plan->block = tile.threads();
  plan->smem_bytes = tile.smem_bytes();
}

// Towards the end a block that begins a long tile keeps all others waiting, so the last section is
// so large that its longest tiles are as much work as all its others: of tiles with 1, 2, ... n
// blocks of keys, n on every multiprocessor and n (n - 1) / 2 of each of 2 * num_sms / (n - 1)
// heads.
void choose_sections(const Device& device, int64_t packs, ForwardPlan* plan) {
  const int64_t most = plan->section;
  plan->section = static_cast<int32_t>(std::min<int64_t>(most, kMostSectionHeads));
  const int64_t wanted = 2 * device.num_sms / std::max(plan->tiles_q - 1, 1);
  const int64_t last = std::min(std::max<int64_t>(wanted, plan->section), most);
  const int64_t before = std::max<int64_t>(packs - last, 0) / plan->section;
  plan->last_section = static_cast<int32_t>(before * plan->section);
}

bool counts_tiles(const ForwardPlan& plan) { return kForwardTiles[plan.variant].masked; }

}  // namespace flash2::sm90
