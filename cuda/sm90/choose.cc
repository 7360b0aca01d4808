#include "sm90/choose.h"

#include <algorithm>
#include <cstdint>

#include "sm90/tiles.h"

namespace flash2::sm90 {

bool has_masks(const Problem& p) {
  return p.is_causal || p.window_left != kUnbounded || p.window_right != kUnbounded ||
         p.chunk_size > 0 || p.query_seq_lengths.data || p.key_value_seq_lengths.data ||
         p.query_segment_ids.data;
}

namespace {

// The head_dim of the tiles that serve the problem, one of the bucket's.
int32_t tile_dim(const ForwardProblem& p, int32_t bucket) {
  const bool narrow = std::max(p.head_dim, p.head_dim_v) <= 192 && p.soft_cap == 0.0f;
  return bucket == 256 && narrow ? 192 : bucket;
}

// The tile that serves the problem if heads are not packed.
int find_tile(const ForwardProblem& p, int32_t head_dim) {
  const bool capped = p.soft_cap > 0.0f, masked = capped || has_masks(p);
  const bool pairs = p.seq_kv >= kPairsKeys;
  int found = -1;
  for (int i = 0; i < kForwardTileCount; ++i) {
    const ForwardTile& tile = kForwardTiles[i];
    if (tile.head_dim != head_dim || tile.masked != masked || tile.capped != capped) continue;
    if (tile.joins) continue;
    if (tile.pairs && !(pairs && tiles_of_pack(p, 1, tile.tile_q()) % 2 == 0)) continue;
    found = i;
    if (p.seq_q <= kShort) break;
  }
  return found;
}

// The tile of this head_dim that packs heads.
int find_packing_tile(int32_t head_dim, bool joins, bool capped) {
  int i = 0;
  while (kForwardTiles[i].head_dim != head_dim || !kForwardTiles[i].packs() ||
         kForwardTiles[i].joins != joins || kForwardTiles[i].capped != capped) {
    ++i;
  }
  return i;
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

// Among how many blocks the keys of a tile are shared out, where a head has so few queries that
// there may be fewer tiles than multiprocessors. No block gets less than kLeastShare of the keys,
// so that little is lost where there are many tiles: the batch size must not decide, as above.
int32_t choose_splits(const ForwardProblem& p, int32_t head_dim, int32_t pack, int32_t tile_q) {
  const bool all_keys =
      p.window_left == kUnbounded && p.chunk_size == 0 && !p.query_segment_ids.data;
  if (!all_keys || tiles_of_pack(p, pack, tile_q) > kMostJoinedRows / tile_q) return 1;
  int32_t splits = 1;
  while (splits < kMostSplits && p.seq_kv / (2 * splits) >= kLeastShare / head_dim) splits *= 2;
  return splits;
}

}  // namespace

bool serves(const Device& device, const ForwardProblem& p) {
  // A tensor map has no empty axis.
  return device.compute_capability == 90 && !p.alibi_slopes.data && p.seq_kv > 0;
}

void choose_tile(const ForwardProblem& p, ForwardPlan* plan) {
  plan->family = 90;
  const int32_t head_dim = tile_dim(p, plan->head_dim);
  const bool capped = p.soft_cap > 0.0f;
  plan->variant = find_tile(p, head_dim);
  const int packing = find_packing_tile(head_dim, false, capped);
  const int32_t packed_tile_q = kForwardTiles[packing].tile_q();
  plan->pack = choose_pack(p, kForwardTiles[plan->variant].tile_q(), packed_tile_q);
  const int joining = find_packing_tile(plan->head_dim, true, capped);
  plan->splits = choose_splits(p, plan->head_dim, plan->pack, kForwardTiles[joining].tile_q());
  if (plan->splits > 1) {
    plan->variant = joining;
  } else if (plan->pack > 1) {
    plan->variant = packing;
  }
  const ForwardTile& tile = kForwardTiles[plan->variant];
  plan->tile_q = tile.tile_q();
  plan->tile_kv = tile.tile_kv;
  plan->stages = tile.stages();
  plan->block = tile.threads();
  plan->smem_bytes = tile.smem_bytes();
  plan->cluster = std::max(plan->splits, tile.blocks());
}

// Towards the end a block that begins a long tile keeps all others waiting, so the last section is
// so large that its longest tiles are as much work as all its others: of tiles with 1, 2, ... n
// blocks of keys, n on every multiprocessor and n (n - 1) / 2 of each of 2 * num_sms / (n - 1)
// heads. A third of the multiprocessors' number is the most: its heads begin all at once, and read
// from memory.
void choose_sections(const Device& device, int64_t packs, ForwardPlan* plan) {
  const int64_t most = plan->section;
  plan->section = static_cast<int32_t>(std::min<int64_t>(most, kMostSectionHeads));
  const int64_t wanted =
      std::min(2 * device.num_sms / std::max(plan->tiles_q - 1, 1), device.num_sms / 3);
  const int64_t last = std::min(std::max<int64_t>(wanted, plan->section), most);
  const int64_t before = std::max<int64_t>(packs - last, 0) / plan->section;
  plan->last_section = static_cast<int32_t>(before * plan->section);
}

bool counts_tiles(const ForwardPlan& plan) {
  return kForwardTiles[plan.variant].masked && plan.splits == 1;
}

}  // namespace flash2::sm90
