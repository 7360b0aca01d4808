// The plan's promises, for every GPU it may meet and without one.
#include "plan.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "check.h"
#include "sm90/tiles.h"

using namespace flash2;

namespace {

constexpr Device kA100{80, 108, 166912, 167936};
constexpr Device kA10{86, 72, 101376, 102400};
constexpr Device kL4{89, 58, 101376, 102400};
constexpr Device kH100{90, 132, 232448, 233472};
constexpr Device kNewer{120, 170, 101376, 102400};
constexpr Device kDevices[] = {kA100, kA10, kL4, kH100, kNewer};

// Addresses are planned with, never read.
const void* address(std::uintptr_t bytes) { return reinterpret_cast<const void*>(bytes); }

ForwardProblem problem(int32_t head_dim = 128, int32_t seq_q = 512, int32_t seq_kv = 512,
                       int32_t batch = 2, int32_t heads_q = 16, int32_t heads_kv = 16) {
  ForwardProblem p;
  p.query = address(1 << 20);
  p.key = address(2 << 20);
  p.value = address(3 << 20);
  p.out = const_cast<void*>(address(4 << 20));
  p.lse = static_cast<float*>(const_cast<void*>(address(5 << 20)));
  p.batch = batch;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.seq_q = seq_q;
  p.seq_kv = seq_kv;
  p.head_dim = p.head_dim_v = head_dim;
  const auto strides = [&](int64_t length, int64_t heads) {
    return Strides{length * heads * head_dim, heads * head_dim, head_dim};
  };
  p.query_stride = p.out_stride = strides(seq_q, heads_q);
  p.key_stride = p.value_stride = strides(seq_kv, heads_kv);
  return p;
}

std::string show(const Device& d, const ForwardProblem& p) {
  return "cc " + std::to_string(d.compute_capability) + ", head_dim " +
         std::to_string(p.head_dim) + "/" + std::to_string(p.head_dim_v) + ", lengths " +
         std::to_string(p.seq_q) + "/" + std::to_string(p.seq_kv) + ", batch " +
         std::to_string(p.batch) + ", heads " + std::to_string(p.heads_q);
}

void check_sound(const Device& d, const ForwardProblem& p) {
  const ForwardPlan plan = plan_forward(d, p);
  const std::string text = show(d, p) + ": " + describe(plan.status);
  CHECK(plan.status == PlanStatus::kOk, text);
  if (plan.status != PlanStatus::kOk) return;
  CHECK(!plan.empty, text);
  CHECK(plan.head_dim >= p.head_dim && plan.head_dim >= p.head_dim_v, text);
  CHECK(plan.smem_bytes <= static_cast<uint32_t>(d.smem_per_block),
        text << ", " << plan.smem_bytes << " bytes of shared memory");
  CHECK(plan.block % 32 == 0 && plan.block >= 32 && plan.block <= 1024, text << plan.block);
  CHECK(plan.grid >= 1 && plan.grid <= 0x7fffffffu, text << plan.grid);
  const int64_t rows = int64_t{p.seq_q} * plan.pack;
  CHECK(static_cast<int64_t>(plan.tiles_q) * plan.tile_q >= rows, text);
  CHECK(static_cast<int64_t>(plan.tiles_q - 1) * plan.tile_q < rows, text);
  CHECK(plan.packs % p.heads_kv == 0 && plan.packs * plan.pack >= p.heads_q, text);
  CHECK(plan.pack >= 1 && (plan.pack & (plan.pack - 1)) == 0, text << plan.pack);
  CHECK(plan.family == 90 || plan.pack == 1, text);
}

void check_refused(const ForwardProblem& p, PlanStatus status, const Device& d = kH100) {
  const ForwardPlan plan = plan_forward(d, p);
  CHECK(plan.status == status, show(d, p) << ": expected '" << describe(status) << "', got '"
                                          << describe(plan.status) << "'");
}

}  // namespace

CASE(every_head_dim_fits_every_gpu) {
  for (const Device& d : kDevices) {
    for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
      for (bool causal : {false, true}) {
        for (DataType type : {DataType::kFloat16, DataType::kBFloat16}) {
          ForwardProblem p = problem(head_dim);
          p.is_causal = causal;
          p.data_type = type;
          check_sound(d, p);
        }
      }
    }
  }
}

CASE(every_length_is_covered) {
  for (const Device& d : kDevices) {
    for (int seq_q : {1, 2, 9, 63, 64, 65, 127, 128, 129, 191, 1000, 16384, 1 << 20}) {
      for (int seq_kv : {1, 7, 64, 65, 16384}) check_sound(d, problem(128, seq_q, seq_kv));
    }
  }
}

CASE(value_may_have_a_head_dim_of_its_own) {
  for (const Device& d : kDevices) {
    for (int head_dim_v : {8, 64, 72, 128, 136, 256}) {
      ForwardProblem p = problem(64);
      p.head_dim_v = head_dim_v;
      p.value_stride = {512LL * 16 * head_dim_v, 16LL * head_dim_v, head_dim_v};
      p.out_stride = p.value_stride;
      check_sound(d, p);
    }
  }
}

CASE(more_heads_than_a_grid_axis_holds) {
  check_sound(kH100, problem(64, 1, 64, 71280, 1, 1));
  check_sound(kH100, problem(64, 1, 64, 1, 71280, 1));
  check_sound(kH100, problem(128, 1, 1, 8300, 16, 16));
}

CASE(heads_may_be_grouped) {
  for (int heads_kv : {1, 2, 4, 8, 16}) check_sound(kA10, problem(128, 512, 512, 2, 16, heads_kv));
}

CASE(nothing_to_write_is_no_launch) {
  for (const ForwardProblem& p :
       {problem(128, 0, 512), problem(128, 512, 512, 0), problem(128, 0, 0, 0)}) {
    const ForwardPlan plan = plan_forward(kH100, p);
    CHECK(plan.status == PlanStatus::kOk && plan.empty, describe(plan.status));
  }
}

CASE(no_keys_still_writes_empty_rows) { check_sound(kH100, problem(128, 512, 0)); }

CASE(hopper_takes_its_own_family) {
  for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
    for (bool causal : {false, true}) {
      ForwardProblem p = problem(head_dim);
      p.is_causal = causal;
      const ForwardPlan plan = plan_forward(kH100, p);
      CHECK(plan.family == 90, show(kH100, p));
      CHECK(plan.block % 128 == 0, show(kH100, p) << ", " << plan.block << " threads");
      CHECK(plan.smem_bytes % 8 == 0, show(kH100, p) << ", " << plan.smem_bytes << " bytes");
      CHECK(plan_forward(kH100, p, 80).family == 80, show(kH100, p));
      for (const Device& d : {kA100, kA10, kL4, kNewer}) {
        CHECK(plan_forward(d, p).family == 80, show(d, p));
      }
    }
  }
}

CASE(hopper_blocks_stay_and_share_the_tiles) {
  for (int seq_q : {1, 100, 512, 16384}) {
    ForwardProblem p = problem(128, seq_q);
    const ForwardPlan whole = plan_forward(kH100, p);
    const int64_t tiles = int64_t{whole.tiles_q} * p.batch * p.heads_q;
    CHECK(whole.grid == std::min<int64_t>(tiles, kH100.num_sms), whole.grid);
    CHECK(whole.workspace_bytes == 0, "equal tiles need no counter");
    p.is_causal = true;
    const ForwardPlan causal = plan_forward(kH100, p);
    CHECK(causal.grid <= static_cast<uint32_t>(kH100.num_sms), causal.grid);
    CHECK(causal.workspace_bytes == 16, "tiles of unequal length need one");
    CHECK(plan_forward(kH100, p, 80).workspace_bytes == 0, "");
  }
}

// Tiles of one batch entry.
int64_t tiles(const ForwardPlan& plan) { return int64_t{plan.packs} * plan.tiles_q; }

CASE(hopper_packs_the_heads_of_short_queries) {
  for (int head_dim : {64, 128, 256}) {
    for (int group : {2, 3, 4, 6, 8, 16, 71}) {
      for (int seq_q = 1; seq_q <= 16; ++seq_q) {
        ForwardProblem p = problem(head_dim, seq_q, 512, 3, 2 * group, 2);
        const ForwardPlan plan = plan_forward(kH100, p);
        check_sound(kH100, p);
        const std::string text = show(kH100, p) + ", packs of " + std::to_string(plan.pack);
        if (group <= 16 && group * seq_q <= 64) {  // one tile for each of the two key heads
          CHECK(tiles(plan) == 2, text << ", " << tiles(plan) << " tiles");
        }
        CHECK(8 * tiles(plan) <= 7 * p.heads_q, text << ", " << tiles(plan) << " tiles");
        CHECK(plan.pack / 2 < group, text);
        CHECK(plan.workspace_bytes == 16, text);
        CHECK(plan_forward(kH100, p, 80).pack == 1 && plan_forward(kA100, p).pack == 1, text);
        p.batch = 1000;
        CHECK(plan_forward(kH100, p).pack == plan.pack, "a row is summed alike in any batch");
      }
    }
  }
}

CASE(hopper_shares_out_many_keys_of_few_queries) {
  for (int head_dim : {64, 128, 256}) {
    for (int group : {1, 2, 8}) {
      for (int seq_q : {1, 5, 16, 300}) {
        for (int shares : {1, 3, 4, 7, 8, 16, 1 << 10}) {  // of half of the least
          const int seq_kv = shares * (1024 * 128 / head_dim);
          ForwardProblem p = problem(head_dim, seq_q, seq_kv, 3, 2 * group, 2);
          const ForwardPlan plan = plan_forward(kH100, p);
          const std::string text = show(kH100, p) + ", splits " + std::to_string(plan.splits);
          const int want = shares < 4 ? 1 : shares < 8 ? 2 : shares < 16 ? 4 : 8;
          CHECK(plan.splits == (seq_q == 300 ? 1 : want), text);
          if (plan.splits > 1) CHECK(plan.grid == plan.splits * tiles(plan) * p.batch, text);
          CHECK(plan_forward(kH100, p, 80).splits == 1, text);
          ForwardProblem other = p;
          other.batch = 1;
          CHECK(plan_forward(kH100, other).splits == plan.splits, text);
          other.window_left = 100;
          CHECK(plan_forward(kH100, other).splits == 1, text);
          other = p;
          other.chunk_size = 64;
          CHECK(plan_forward(kH100, other).splits == 1, text);
        }
      }
    }
  }
}

CASE(pairs_share_long_keys_and_have_a_tile_each) {
  for (int head_dim : {64, 128, 256}) {
    for (int seq_q : {100, 2048, 8192, 8320, 16384}) {
      for (int seq_kv : {512, 8191, 8192, 100000}) {
        ForwardProblem p = problem(head_dim, seq_q, seq_kv, 3);
        const ForwardPlan plan = plan_forward(kH100, p);
        const bool pairs = plan.cluster == 2 && plan.splits == 1;
        const bool even = tiles(plan) / p.heads_q % 2 == 0;
        CHECK(pairs == (head_dim == 128 && seq_q > 1024 && seq_kv >= 8192 && even),
              show(kH100, p) << ", clusters of " << plan.cluster);
        Device odd = kH100;
        odd.num_sms = 3;
        if (pairs) CHECK(plan.grid % 2 == 0 && plan_forward(odd, p).grid == 2, plan.grid);
        p.is_causal = true;
        CHECK(plan_forward(kH100, p).cluster == plan_forward(kH100, p).splits, show(kH100, p));
      }
    }
  }
}

CASE(the_last_section_balances_its_tiles) {
  for (int head_dim : {64, 128, 256}) {
    for (int seq : {100, 512, 1024, 4096, 16384, 1 << 18}) {
      for (int batch : {1, 3, 64}) {
        ForwardProblem p = problem(head_dim, seq, seq, batch);
        CHECK(plan_forward(kH100, p).last_section >= batch * p.heads_q, "none without a mask");
        p.is_causal = true;
        const ForwardPlan plan = plan_forward(kH100, p);
        const int rest = batch * p.heads_q - plan.last_section;
        CHECK(plan.last_section % plan.section == 0 && rest > 0, show(kH100, p));
        CHECK(plan.section <= 8 && (rest >= plan.section || plan.last_section == 0),
              show(kH100, p) << ", sections of " << plan.section << ", " << rest << " left");
      }
    }
  }
}

CASE(packing_makes_fewer_tiles_or_is_left) {
  for (int head_dim : {64, 128, 256}) {
    for (int group : {1, 2, 5, 8, 64}) {
      for (int seq_q : {1, 17, 64, 100, 128, 150, 257, 512, 1100, 4096, 16384}) {
        for (bool causal : {false, true}) {
          ForwardProblem p = problem(head_dim, seq_q, 512, 1, 2 * group, 2), alone = p;
          alone.heads_kv = alone.heads_q;
          p.is_causal = alone.is_causal = causal;
          const ForwardPlan plan = plan_forward(kH100, p), bare = plan_forward(kH100, alone);
          const std::string text = show(kH100, p) + ", packs of " + std::to_string(plan.pack);
          CHECK(bare.pack == 1, text);
          if (plan.pack == 1) {
            CHECK(plan.variant == bare.variant && tiles(plan) == tiles(bare), text);
          } else {
            CHECK(8 * tiles(plan) <= 7 * tiles(bare), text);
          }
        }
      }
    }
  }
}

// What changes the order of a row's sums must not depend on the batch.
CASE(a_row_is_summed_alike_alone_and_in_a_batch) {
  for (int head_dim : {64, 128, 256}) {
    for (int seq : {1, 128, 300, 512, 1024, 4096, 16384}) {
      for (bool causal : {false, true}) {
        ForwardProblem one = problem(head_dim, seq, seq, 1),
                       many = problem(head_dim, seq, seq, 64);
        one.is_causal = many.is_causal = causal;
        const ForwardPlan a = plan_forward(kH100, one), b = plan_forward(kH100, many);
        CHECK(a.variant == b.variant, show(kH100, one));
      }
    }
  }
}

CASE(same_problem_same_plan) {
  const ForwardPlan a = plan_forward(kH100, problem()), b = plan_forward(kH100, problem());
  CHECK(a.variant == b.variant && a.grid == b.grid && a.smem_bytes == b.smem_bytes, "");
}

CASE(refuses_old_gpus) {
  check_refused(problem(), PlanStatus::kDeviceTooOld, Device{75, 40, 65536, 65536});
  check_refused(problem(), PlanStatus::kDeviceTooOld, Device{70, 80, 98304, 98304});
}

CASE(refuses_head_dims) {
  for (int head_dim : {0, 4, 12, 100, 264, 512}) {
    check_refused(problem(head_dim), PlanStatus::kHeadDim);
  }
  ForwardProblem p = problem();
  p.head_dim_v = 257;
  check_refused(p, PlanStatus::kHeadDim);
}

CASE(refuses_heads_that_do_not_divide) {
  check_refused(problem(128, 512, 512, 2, 16, 3), PlanStatus::kHeads);
  check_refused(problem(128, 512, 512, 2, 16, 0), PlanStatus::kHeads);
}

CASE(refuses_what_overflows) {
  check_refused(problem(128, kMaxPosition + 1, 512, 1, 1, 1), PlanStatus::kTooLong);
  check_refused(problem(128, 512, kMaxPosition + 1, 1, 1, 1), PlanStatus::kTooLong);
  ForwardProblem p = problem();
  p.window_left = std::numeric_limits<int32_t>::max();
  check_refused(p, PlanStatus::kTooLong);
  check_refused(problem(8, kMaxPosition, 1, 1 << 16, 1 << 4, 1), PlanStatus::kTooManyTiles);
}

CASE(hopper_has_tiles_for_soft_caps) {
  for (int head_dim : {40, 64, 128, 192, 256}) {
    for (bool causal : {false, true}) {
      for (int heads_kv : {16, 2}) {
        for (int seq_q : {1, 512}) {
          ForwardProblem p = problem(head_dim, seq_q, 16384, 2, 16, heads_kv);
          p.is_causal = causal;
          const ForwardPlan without = plan_forward(kH100, p);
          CHECK(!sm90::kForwardTiles[without.variant].capped, show(kH100, p));
          p.soft_cap = 5.0f;
          check_sound(kH100, p);
          const ForwardPlan plan = plan_forward(kH100, p);
          CHECK(plan.family == 90 && plan.splits == without.splits, show(kH100, p));
          CHECK(sm90::kForwardTiles[plan.variant].capped, show(kH100, p));
          CHECK(plan_forward(kH100, p, 80).family == 80, show(kH100, p));
        }
      }
    }
  }
}

CASE(hopper_has_tiles_between_128_and_256) {
  const auto tile_dim = [](int32_t head_dim, int32_t head_dim_v, int32_t seq_q = 512) {
    ForwardProblem p = problem(head_dim, seq_q, 16384);
    p.head_dim_v = head_dim_v;
    p.value_stride = p.out_stride = {512LL * 16 * head_dim_v, 16LL * head_dim_v, head_dim_v};
    const ForwardPlan plan = plan_forward(kH100, p);
    CHECK(plan.head_dim == 256, plan.head_dim);
    return sm90::kForwardTiles[plan.variant].head_dim;
  };
  CHECK(tile_dim(192, 192) == 192 && tile_dim(136, 136) == 192, "");
  CHECK(tile_dim(192, 128) == 192 && tile_dim(128, 192) == 192, "");
  CHECK(tile_dim(200, 200) == 256 && tile_dim(192, 256) == 256, "");
  CHECK(tile_dim(192, 192, 1) == 256, "keys shared out");
}

// Whether ids are packed is known on the device alone.
CASE(segments_on_hopper_have_both_families) {
  for (int head_dim : {40, 64, 128, 256}) {
    for (int seq_kv : {100, 512, 16384}) {
      for (int heads_kv : {16, 2}) {
        ForwardProblem p = problem(head_dim, 512, seq_kv, 2, 16, heads_kv);
        p.query_segment_ids.data = p.key_value_segment_ids.data =
            static_cast<const int32_t*>(address(6 << 20));
        check_sound(kH100, p);
        const ForwardPlan plan = plan_forward(kH100, p);
        CHECK(plan.family == 90 && sm90::kForwardTiles[plan.variant].masked, show(kH100, p));
        CHECK(plan.splits == 1, show(kH100, p) << ", " << plan.splits << " splits");
        CHECK(plan.otherwise.size() == 1, show(kH100, p));
        const ForwardPlan& otherwise = plan.otherwise.front();
        CHECK(otherwise.family == 80 && otherwise.general && otherwise.otherwise.empty(), "");
        CHECK(otherwise.grid <= uint32_t(4 * kH100.num_sms), otherwise.grid);
        const int64_t bytes = forward_workspace_bytes(p.batch, p.seq_q, p.seq_kv, true);
        CHECK(static_cast<int64_t>(plan.workspace_bytes) == bytes, plan.workspace_bytes);
        CHECK(plan_forward(kH100, p, 80).otherwise.empty(), show(kH100, p));
        for (const Device& d : {kA100, kA10, kL4, kNewer}) {
          CHECK(plan_forward(d, p).family == 80 && plan_forward(d, p).otherwise.empty(), "");
        }
        p.soft_cap = 5.0f;
        const ForwardPlan capped = plan_forward(kH100, p);
        CHECK(capped.family == 90 && sm90::kForwardTiles[capped.variant].capped, show(kH100, p));
        CHECK(capped.otherwise.size() == 1 && capped.otherwise.front().general, show(kH100, p));
        p.alibi_slopes.data = static_cast<const float*>(address(7 << 20));
        CHECK(plan_forward(kH100, p).family == 80, show(kH100, p));
        CHECK(plan_forward(kH100, p).otherwise.empty(), show(kH100, p));
      }
    }
  }
}

CASE(segment_workspace_has_room_for_all) {
  for (int64_t batch : {1, 3}) {
    for (int64_t seq_q : {1, 1000, 1024, 5000}) {
      for (int64_t seq_kv : {1, 1025, 300}) {
        const SegmentWorkspace w = segment_workspace(batch, seq_q, seq_kv);
        CHECK(w.blocks * kSegmentRows >= std::max(seq_q, seq_kv), w.blocks);
        CHECK(w.packed == 0 && w.row_keys % 16 == 0, w.row_keys);
        CHECK(w.row_keys >= batch * w.blocks * 4, w.row_keys);
        CHECK(w.key_rows == w.row_keys + batch * seq_q * 8, w.key_rows);
        CHECK(w.bytes == w.key_rows + batch * seq_kv * 8, w.bytes);
      }
    }
  }
}

CASE(refuses_half_the_segment_ids) {
  ForwardProblem p = problem();
  p.query_segment_ids.data = static_cast<const int32_t*>(address(6 << 20));
  check_refused(p, PlanStatus::kSegmentIds);
}

CASE(refuses_negative_arguments) {
  ForwardProblem p = problem();
  p.chunk_size = -1;
  check_refused(p, PlanStatus::kNegativeArgument);
  p = problem();
  p.soft_cap = -1.0f;
  check_refused(p, PlanStatus::kNegativeArgument);
}

CASE(refuses_misaligned_operands) {
  ForwardProblem p = problem();
  p.key = address((2 << 20) + 8);
  check_refused(p, PlanStatus::kAlignment);
  p = problem();
  p.value_stride.row += 4;
  check_refused(p, PlanStatus::kAlignment);
}

int main(int argc, char** argv) { return run_cases(argc, argv); }
