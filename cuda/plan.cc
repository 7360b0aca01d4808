#include "plan.h"

#include <algorithm>
#include <cstdint>

#include "problem.h"
#include "sm80/tiles.h"
#include "sm90/choose.h"

namespace flash2 {
namespace {

using sm80::ForwardTile;
using sm80::kForwardTileCount;
using sm80::kForwardTiles;

// What the driver takes of a block's shared memory.
constexpr int kReservedSmem = 1024;
// What the tiles of heads that are walked together read: about what an L2 cache holds beside the
// rest.
constexpr int64_t kSectionBytes = int64_t{32} << 20;

bool is_head_dim(int32_t d) { return d >= 8 && d <= 256 && d % 8 == 0; }
bool is_position(int64_t x) { return x >= -kMaxPosition && x <= kMaxPosition; }

// The first tile of the bucket that fits as often as it was made for, else the last that fits.
int choose_tile(const Device& device, int bucket) {
  int chosen = -1;
  for (int i = 0; i < kForwardTileCount; ++i) {
    const ForwardTile& tile = kForwardTiles[i];
    if (tile.head_dim != bucket || tile.smem_bytes() > device.smem_per_block) continue;
    chosen = i;
    if (tile.blocks_per_sm * (tile.smem_bytes() + kReservedSmem) <= device.smem_per_sm) break;
  }
  return chosen;
}

void choose_sm80_tile(const Device& device, const ForwardProblem& p, ForwardPlan* plan) {
  plan->variant = choose_tile(device, plan->head_dim);
  if (plan->variant < 0) {
    plan->status = PlanStatus::kDeviceTooOld;
    return;
  }
  const ForwardTile& tile = kForwardTiles[plan->variant];
  plan->general = is_general(p);
  plan->tile_q = tile.tile_q();
  plan->tile_kv = tile.tile_kv;
  plan->stages = 2;
  plan->block = tile.threads();
  plan->smem_bytes = tile.smem_bytes();
}

}  // namespace

bool is_aligned(const void* pointer, const Strides& stride, int64_t batch, int64_t rows,
                int64_t heads) {
  const auto odd = [](int64_t s, int64_t size) { return size > 1 && s % 8 != 0; };
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && !odd(stride.batch, batch) &&
         !odd(stride.row, rows) && !odd(stride.head, heads);
}

int32_t bucket(const Problem& p) {
  const int32_t widest = std::max(p.head_dim, p.head_dim_v);
  return widest <= 64 ? 64 : widest <= 128 ? 128 : 256;
}

bool bends_scores(const Problem& p) { return p.soft_cap > 0.0f || p.alibi_slopes.data; }

bool is_general(const Problem& p) { return bends_scores(p) || p.query_segment_ids.data; }

SegmentWorkspace segment_workspace(int64_t batch, int64_t seq_q, int64_t seq_kv) {
  SegmentWorkspace w;
  const int64_t longest = std::max(seq_q, seq_kv);
  w.blocks = static_cast<int32_t>((longest + kSegmentRows - 1) / kSegmentRows);
  w.row_keys = (batch * w.blocks * 4 + 15) / 16 * 16;
  w.key_rows = w.row_keys + batch * seq_q * 8;
  w.bytes = w.key_rows + batch * seq_kv * 8;
  return w;
}

int64_t forward_workspace_bytes(int64_t batch, int64_t seq_q, int64_t seq_kv, bool segments) {
  return static_cast<int64_t>(sm90::kCounterBytes) +
         (segments ? segment_workspace(batch, seq_q, seq_kv).bytes : 0);
}

bool is_uneven(const Problem& p) {
  return p.is_causal && p.window_left == kUnbounded && p.chunk_size == 0;
}

int32_t heads_in_cache(int64_t bytes, int64_t heads) {
  return static_cast<int32_t>(
      std::clamp<int64_t>(kSectionBytes / std::max<int64_t>(bytes, 1), 1, heads));
}

PlanStatus check_problem(const Device& device, const Problem& p) {
  if (device.compute_capability < 80) return PlanStatus::kDeviceTooOld;
  if (std::min({p.batch, p.heads_q, p.heads_kv, p.seq_q, p.seq_kv, p.chunk_size}) < 0 ||
      p.soft_cap < 0.0f) {
    return PlanStatus::kNegativeArgument;
  }
  if (std::min(p.window_left, p.window_right) < kUnbounded) return PlanStatus::kNegativeArgument;
  if (!is_head_dim(p.head_dim) || !is_head_dim(p.head_dim_v)) return PlanStatus::kHeadDim;
  if (p.heads_q > 0 && (p.heads_kv == 0 || p.heads_q % p.heads_kv != 0)) return PlanStatus::kHeads;
  for (int32_t x :
       {p.seq_q, p.seq_kv, p.query_offset, p.window_left, p.window_right, p.chunk_size}) {
    if (!is_position(x)) return PlanStatus::kTooLong;
  }
  if ((p.query_segment_ids.data == nullptr) != (p.key_value_segment_ids.data == nullptr)) {
    return PlanStatus::kSegmentIds;
  }
  if (!is_aligned(p.query, p.query_stride, p.batch, p.seq_q, p.heads_q) ||
      !is_aligned(p.key, p.key_stride, p.batch, p.seq_kv, p.heads_kv) ||
      !is_aligned(p.value, p.value_stride, p.batch, p.seq_kv, p.heads_kv)) {
    return PlanStatus::kAlignment;
  }
  return PlanStatus::kOk;
}

const char* describe(PlanStatus status) {
  switch (status) {
    case PlanStatus::kOk:
      return "the plan is valid";
    case PlanStatus::kDeviceTooOld:
      return "the kernels need compute capability 8.0 and the 96 KB of shared memory that such "
             "devices give to a block";
    case PlanStatus::kHeadDim:
      return "head_dim must be a multiple of 8 from 8 to 256, for query, key and value";
    case PlanStatus::kHeads:
      return "the heads of key and value must divide those of query";
    case PlanStatus::kTooLong:
      return "lengths, offsets, windows and chunks must lie below 2^29";
    case PlanStatus::kTooManyTiles:
      return "batch * heads * query tiles must lie below 2^31";
    case PlanStatus::kSegmentIds:
      return "segment ids must be given for query and key, or for neither";
    case PlanStatus::kNegativeArgument:
      return "sizes, windows, chunk size and soft cap must not be negative";
    case PlanStatus::kAlignment:
      return "arrays must be aligned to 16 bytes, and their strides multiples of 8 elements";
  }
  return "unknown status";
}

int32_t packs_of_heads(const Problem& p, int32_t pack) {
  if (p.heads_q == 0) return 0;
  return p.heads_kv * ((p.heads_q / p.heads_kv + pack - 1) / pack);
}

int64_t tiles_of_pack(const Problem& p, int32_t pack, int32_t tile_q) {
  return (int64_t{p.seq_q} * pack + tile_q - 1) / tile_q;
}

ForwardPlan plan_forward(const Device& device, const ForwardProblem& p, int32_t family) {
  ForwardPlan plan;
  plan.status = check_problem(device, p);
  if (plan.status == PlanStatus::kOk &&
      !is_aligned(p.out, p.out_stride, p.batch, p.seq_q, p.heads_q)) {
    plan.status = PlanStatus::kAlignment;
  }
  if (plan.status != PlanStatus::kOk) return plan;

  plan.head_dim = bucket(p);
  if (family != 80 && sm90::serves(device, p)) {
    sm90::choose_tile(p, &plan);
  } else {
    choose_sm80_tile(device, p, &plan);
  }
  if (plan.status != PlanStatus::kOk) return plan;

  const int64_t heads = int64_t{p.batch} * p.heads_q;
  plan.packs = packs_of_heads(p, plan.pack);
  const int64_t packs = int64_t{p.batch} * plan.packs;
  const int64_t tiles_q = tiles_of_pack(p, plan.pack, plan.tile_q), tiles = packs * tiles_q;
  plan.tiles_q = static_cast<int32_t>(tiles_q);
  if (heads > INT32_MAX || tiles * plan.splits > INT32_MAX) {
    plan.status = PlanStatus::kTooManyTiles;
    return plan;
  }
  plan.empty = tiles == 0;
  plan.grid = static_cast<uint32_t>(tiles);
  if (plan.family == 90) {
    // Blocks that stay, one per multiprocessor, or clusters for a tile each.
    const int32_t resident = device.num_sms / plan.cluster * plan.cluster;
    plan.grid = static_cast<uint32_t>(std::min<int64_t>(tiles, resident));
    if (plan.splits > 1) plan.grid = static_cast<uint32_t>(tiles * plan.splits);
    if (sm90::counts_tiles(plan)) plan.workspace_bytes = sm90::kCounterBytes;
    if (p.query_segment_ids.data) {
      plan.workspace_bytes = forward_workspace_bytes(p.batch, p.seq_q, p.seq_kv, true);
      plan.otherwise.push_back(plan_forward(device, p, 80));
      ForwardPlan& otherwise = plan.otherwise.front();
      // Few blocks, since each that finds no work takes a microsecond, and some for each
      // multiprocessor, since tiles are not equally long.
      otherwise.grid = std::min<uint32_t>(otherwise.grid, 4 * device.num_sms);
      if (plan.status == PlanStatus::kOk) plan.status = otherwise.status;
    }
  }

  if (is_uneven(p) && !plan.empty) {
    const int64_t kv_bytes =
        2 * int64_t{p.seq_kv} * (p.head_dim + p.head_dim_v) * p.heads_kv / plan.packs;
    plan.section = heads_in_cache(kv_bytes, packs);
    if (plan.family == 90) sm90::choose_sections(device, packs, &plan);
  }
  return plan;
}

}  // namespace flash2
