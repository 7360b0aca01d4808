#include "sm90/choose_backward.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "sm90/backward_tiles.h"
#include "sm90/choose.h"

namespace flash2::sm90 {
namespace {

// Whether the first key tile at a query tile stores its sums of dQ, and nobody writes zeros
// before. All others that are in step wait for it then, which costs up to 7 % of long walks; the
// zeros take as long whatever the length of a walk. Deterministic single blocks wait for their
// turn anyway, and of local ones few are at work at the same query tile.
bool first_stores(const BackwardProblem& p, int32_t head_dim, bool masked) {
  // Who is the first of a query tile whose first rows see nothing, segments do not say.
  if (p.query_segment_ids.data) return false;
  if (head_dim == 256) return p.seq_q <= (masked ? 2048 : 1024);
  if (p.deterministic || p.window_left != kUnbounded || p.window_right != kUnbounded ||
      p.chunk_size > 0) {
    return true;
  }
  // A group's add to the same sums besides, unless nobody waits: KeyTile::first_of_group.
  const bool grouped = p.heads_q >= 4 * p.heads_kv;
  const int64_t tiles = p.seq_kv / 128;  // of a head
  if (head_dim == 128) return tiles < (grouped ? (masked ? 16 : 1) : masked ? 32 : 64);
  return tiles < (grouped ? (masked ? 64 : 32) : masked ? 128 : 256);
}

// Whether walks without masks go around. Of long ones the beginnings, where they are in each
// other's way, are a small part; at head_dim 64 groups, whose walks add to sums of their own heads
// then, gain at every length that was tried. With fewer tiles than query heads to a key head it
// was slower.
bool goes_around(const BackwardProblem& p, int32_t head_dim) {
  if (head_dim == 256 || p.deterministic) return false;
  const int64_t group = p.heads_q / p.heads_kv, tiles = p.seq_kv / 128;
  const int64_t most = head_dim == 64 ? (group == 1 ? 16 : 128)
                       : group == 1   ? 32
                       : group < 4    ? 16
                                      : 8;
  return group <= tiles && tiles <= most;
}

// Some eight tiles of a head at work at once share its Q and dO, and wait little for their turn.
int64_t most_of_few(int64_t workers) { return std::max<int64_t>(workers / 8, 1); }

}  // namespace

bool serves(const Device& device, const BackwardProblem& p) {
  // A tensor map has no empty axis.
  const bool empty = p.batch == 0 || p.heads_q == 0 || p.seq_q == 0 || p.seq_kv == 0;
  // For the same reason key tiles cannot take turns.
  const bool turns = p.deterministic && p.query_segment_ids.data;
  // At head_dim 64 a cap's derivative takes registers that no step of 128 queries has (C7511).
  const bool too_wide = p.soft_cap > 0.0f && bucket(p) == 64;
  return device.compute_capability == 90 && !p.alibi_slopes.data && !turns && !too_wide && !empty;
}

void choose_tile(const BackwardProblem& p, BackwardPlan* plan) {
  const bool pair = plan->head_dim == 256;
  const bool capped = p.soft_cap > 0.0f;
  // Whether some row of a tile of 128 keys may not see all of them.
  const bool masked = capped || has_masks(p) || p.seq_kv % 128 != 0;
  // Elsewhere a kernel for it would be no faster.
  const bool deterministic = p.deterministic && masked && plan->head_dim == 128;
  // 80 query rows a step: 1 to 2 % faster at 1024 rows, 4 to 6 % at 2048 and beyond. Made for
  // whole panels.
  const bool large = plan->head_dim == 128 && p.head_dim == 128 && !masked &&
                     p.seq_q >= kLongRows && !p.dscale_rows;
  const bool around = !masked && goes_around(p, plan->head_dim);
  const bool first = around || first_stores(p, plan->head_dim, masked);
  const bool turns = pair && (first || p.deterministic);
  for (int i = 0; i < kBackwardTileCount; ++i) {
    const BackwardTile& tile = kBackwardTiles[i];
    if (tile.head_dim != plan->head_dim || tile.masked != masked ||
        tile.deterministic != deterministic || tile.turns != turns || tile.around != around ||
        tile.capped != capped || tile.transposed() != large) {
      continue;
    }
    plan->family = 90;
    plan->variant = i;
    plan->tile_q = tile.tile_q;
    plan->tile_kv = tile.tile_kv();
    plan->stages = 2;
    plan->block = tile.threads();
    plan->smem_bytes = tile.smem_bytes();
    plan->first_stores = first;
    plan->transposed_sums = tile.transposed();
  }
}

bool finishes_inside(const BackwardProblem& p, const BackwardPlan& plan) {
  // How many key tiles add to a query tile must be plain to see, and be more than none.
  const bool plain = p.window_left == kUnbounded && p.window_right == kUnbounded &&
                     p.chunk_size == 0 && p.query_offset == 0 && !p.query_offset_operand.data &&
                     !p.prefix_lengths.data && !p.query_seq_lengths.data &&
                     !p.key_value_seq_lengths.data && !p.query_segment_ids.data;
  return plain && kBackwardTiles[plan.variant].finishes() && p.head_dim == plan.head_dim &&
         !p.dscale_rows;
}

int32_t section(const Device& device, const BackwardProblem& p, const BackwardPlan& plan,
                int64_t heads, int64_t cached) {
  const bool grouped = p.heads_q > p.heads_kv, deterministic = p.deterministic;
  const int64_t workers = round(device, plan);
  const int64_t tiles = plan.tiles_kv;
  const int64_t eighth = most_of_few(workers);
  int64_t target;
  if (few_tiles(device, plan)) {
    // All of a head's tiles at once. Of groups no more than that: Q, dO and sums of dQ of eight
    // heads are then brought once for all of its tiles, not once for each round of them.
    target = (workers + tiles / 2) / tiles;
    if (!grouped || deterministic) target = std::max(eighth, target);
    // With uneven tiles of as many again there is work while others wait. (Not of groups: -9 to
    // +15 %.)
    if (deterministic && is_uneven(p) && !grouped) target = std::max(2 * eighth, target);
  } else if (!is_uneven(p)) {
    // Tiles that wait for their turn had rather begin one after another than all of a head at
    // once; not at the price of Q, dO and sums that no cache holds. Two heads are up to 4 % slower
    // than one after another.
    target = cached > 2 ? std::min(eighth, cached) : 1;
  } else {
    // The longest tile should not take longer than a worker's share of the section, of which the
    // mean tile is half as long: else the last section ends with one tile.
    target = std::max(cached, (2 * workers + tiles / 2) / tiles);
    if (deterministic) target = std::max(target, eighth);
  }
  // For the same reason no section should be much smaller than the others, the last one least of
  // all: of the sizes about there, the one that divides the heads best.
  target = std::min(heads, target);
  int64_t best = target;
  const auto last = [&](int64_t size) { return heads - (heads - 1) / size * size; };
  for (int64_t size = target * 2 / 3; size <= std::min(heads, target * 3 / 2); ++size) {
    if (size < 1) continue;
    const int64_t better = last(size) * best - last(best) * size;  // as fractions of the size
    const bool nearer = std::abs(size - target) < std::abs(best - target);
    if (better > 0 || (better == 0 && nearer)) best = size;
  }
  return static_cast<int32_t>(best);
}

bool few_tiles(const Device& device, const BackwardPlan& plan) {
  return plan.tiles_kv <= most_of_few(round(device, plan));
}

int32_t round(const Device& device, const BackwardPlan& plan) {
  return std::max(device.num_sms / kBackwardTiles[plan.variant].blocks, 1);
}

int64_t grid(const Device& device, const BackwardPlan& plan, int64_t tiles) {
  // They stay, one block per multiprocessor.
  return kBackwardTiles[plan.variant].blocks * std::min<int64_t>(tiles, round(device, plan));
}

}  // namespace flash2::sm90
