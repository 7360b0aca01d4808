// What the backward's plan promises, for every GPU it may meet and without one.
#include <algorithm>
#include <cstdint>
#include <string>

#include "check.h"
#include "plan.h"
#include "sm90/backward_tiles.h"

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
  const uint32_t tiles = static_cast<uint32_t>(plan.tiles_kv) * p.batch * p.heads_kv;
  CHECK(plan.family == 90 || plan.grid == tiles, text);
  const BackwardWorkspace& w = plan.workspace;
  CHECK(plan.rows_grid * kRowPadding == w.rows_per_head * p.batch * p.heads_q, text);
  CHECK(w.rows_per_head % plan.tile_q == 0, text << ", tiles of " << plan.tile_q << " rows");
  const int64_t padding =
      p.head_dim == 128 && p.seq_q >= kLongRows ? kLongHeadPadding : kHeadPadding;
  CHECK(w.rows_per_head >= p.seq_q && w.rows_per_head < p.seq_q + padding, text);
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
  const BackwardWorkspace w = backward_workspace(3, 5, 100, 72, 200, false);
  const int64_t rows = 3 * 5 * 128;
  CHECK(w.bytes == rows * (4 * 72 + 8) + rows / 4 + 64 + 16, w.bytes);  // 15 heads: 64 bytes
  CHECK(backward_workspace(1, 1024, 1 << 20, 256, 1, false).bytes > int64_t{1} << 40, "");
}

CASE(backward_on_hopper_takes_its_own_family) {
  for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
    for (int seq_kv : {1, 128, 500, 16384}) {
      for (bool causal : {false, true}) {
        for (bool deterministic : {false, true}) {
          BackwardProblem p = problem(head_dim, 512, seq_kv);
          p.is_causal = causal;
          p.deterministic = deterministic;
          check_sound(kH100, p);
          const BackwardPlan plan = plan_backward(kH100, p);
          const uint32_t tiles = static_cast<uint32_t>(plan.tiles_kv) * p.batch * p.heads_kv;
          CHECK(plan.family == 90 && plan.block == 384, show(kH100, p));
          CHECK(plan.grid == (head_dim > 128 ? 2 * std::min(tiles, 66u) : std::min(tiles, 132u)),
                show(kH100, p) << ", " << plan.grid << " blocks for " << tiles << " tiles");
          CHECK(plan_backward(kH100, p, 80).family == 80, show(kH100, p));
          for (const Device& d : kDevices) {
            if (d.compute_capability == 90) continue;
            CHECK(plan_backward(d, p).family == 80, show(d, p));
          }
        }
      }
    }
  }
}

// Else a problem with masks would get a kernel without code for them.
CASE(backward_on_hopper_masks_where_something_is_hidden) {
  const int32_t plain = plan_backward(kH100, problem()).variant;
  const auto check = [&](const char* what, void (*set)(BackwardProblem&)) {
    BackwardProblem p = problem();
    set(p);
    const BackwardPlan plan = plan_backward(kH100, p);
    CHECK(plan.family == 90 && plan.variant != plain, what);
  };
  const auto lengths = static_cast<const int32_t*>(address(5 << 20));
  static const int32_t* some = lengths;
  check("causal", [](BackwardProblem& p) { p.is_causal = true; });
  check("left", [](BackwardProblem& p) { p.window_left = 600; });
  check("right", [](BackwardProblem& p) { p.window_right = 600; });
  check("chunk", [](BackwardProblem& p) { p.chunk_size = 64; });
  check("query lengths", [](BackwardProblem& p) { p.query_seq_lengths.data = some; });
  check("key lengths", [](BackwardProblem& p) { p.key_value_seq_lengths.data = some; });
  check("ragged keys", [](BackwardProblem& p) { p.seq_kv = 500; });
}

CASE(backward_on_hopper_takes_longer_steps_where_nothing_is_hidden) {
  CHECK(plan_backward(kH100, problem(128, kLongRows)).tile_q == 80, "");
  CHECK(plan_backward(kH100, problem(128, kLongRows - 1)).tile_q == 64, "");
  CHECK(plan_backward(kH100, problem(120, kLongRows)).tile_q == 64, "");
  BackwardProblem p = problem(128, kLongRows);
  p.is_causal = true;
  CHECK(plan_backward(kH100, p).tile_q == 64, "");
  p = problem(128, kLongRows);
  p.heads_kv = p.heads_q / 4;
  CHECK(plan_backward(kH100, p).tile_q == 80, "");
  p = problem(128, kLongRows);
  p.dscale_rows = static_cast<float*>(address(6 << 20));
  CHECK(plan_backward(kH100, p).tile_q == 64, "");
}

CASE(backward_on_hopper_walks_heads_in_like_sections) {
  const auto section = [](int32_t head_dim, int32_t seq, int32_t heads_kv, int32_t group = 1,
                          bool deterministic = false) {
    BackwardProblem p = problem(head_dim, seq, seq, 1, heads_kv * group, heads_kv);
    p.is_causal = true;
    p.deterministic = deterministic;
    return plan_backward(kH100, p).section;
  };
  // As many as the L2 cache holds, or as give two rounds of tiles.
  CHECK(section(128, 16384, 16) == 2 && section(128, 8192, 32) == 4, section(128, 8192, 32));
  CHECK(section(64, 8192, 64) == 8 && section(256, 4096, 32) == 4, section(64, 8192, 64));
  CHECK(section(128, 8192, 4, 8) == 4, "a group of 8: two rounds of tiles");
  // All tiles of a short head at once.
  CHECK(section(128, 512, 512) == 32 && section(128, 1024, 256) == 16, section(128, 512, 512));
  CHECK(section(256, 1024, 128) == 8, section(256, 1024, 128));
  // Of groups too, and never two rounds.
  CHECK(section(256, 1024, 16, 8) == 8 && section(256, 512, 64, 8) == 16, "groups of 8");
  CHECK(section(128, 1024, 32, 8) == 16 && section(64, 2048, 128, 8) == 8, "groups of 8");
  CHECK(section(256, 1024, 16, 8, true) == 8, "in turn");
  CHECK(section(128, 2048, 128, 8, true) == 16, "in turn");
  // Where they wait for their turn, few of a head; of a short one fewer still.
  CHECK(section(128, 8192, 32, 1, true) == 16, section(128, 8192, 32, 1, true));
  CHECK(section(128, 2048, 128, 1, true) == 32, section(128, 2048, 128, 1, true));
  CHECK(section(256, 1024, 128, 1, true) == 16, section(256, 1024, 128, 1, true));
  // The last section ends with one tile if it is smaller than the others.
  for (int32_t seq : {512, 2048, 8192, 32768}) {
    for (int32_t heads = 1; heads <= 100; ++heads) {
      const int32_t size = section(128, seq, heads);
      const int32_t last = (heads - 1) % size + 1;
      CHECK(2 * last >= size, heads << " heads of " << seq << ": sections of " << size);
    }
  }
  BackwardProblem p = problem(128, 512, 512, 32, 16, 16);
  CHECK(plan_backward(kH100, p).section == 1, "");
}

// Of equally long tiles, those that wait for their turn.
CASE(backward_on_hopper_walks_heads_in_turn_in_sections) {
  const auto section = [](int32_t head_dim, int32_t seq, int32_t heads, int32_t family = 0) {
    BackwardProblem p = problem(head_dim, seq, seq, 1, heads, heads);
    p.deterministic = true;
    return plan_backward(kH100, p, family).section;
  };
  // Some eight tiles of a head at once.
  CHECK(section(64, 512, 1024) == 32 && section(128, 2048, 128) == 16, section(128, 2048, 128));
  CHECK(section(256, 2048, 64) == 8, section(256, 2048, 64));
  // More where no cache holds so many heads; all where it holds but two.
  CHECK(section(128, 4096, 64) == 8 && section(64, 16384, 32) == 4, section(128, 4096, 64));
  CHECK(section(128, 16384, 16) == 1 && section(256, 16384, 8) == 1, section(128, 16384, 16));
  CHECK(section(128, 2048, 128, 80) == 1, "sm80");
}

// Every second section of a group walks the other way, where a section is one round.
CASE(backward_on_hopper_turns_from_section_to_section) {
  const auto turns = [](int32_t seq, int32_t group, bool causal, bool deterministic) {
    BackwardProblem p = problem(128, seq, seq, 1, 16, 16 / group);
    p.is_causal = causal;
    p.deterministic = deterministic;
    return plan_backward(kH100, p).sections_turn;
  };
  CHECK(turns(512, 8, true, false) && turns(2048, 2, true, false), "groups");
  CHECK(!turns(2049, 8, true, false), "several rounds of a head");
  CHECK(!turns(512, 1, true, false), "no groups");
  CHECK(!turns(512, 8, true, true), "in turn");
  CHECK(!turns(512, 8, false, false), "tiles of one length");
}

// Every second round of tiles walks the other way.
CASE(backward_on_hopper_counts_the_tiles_at_work) {
  const auto round = [](int32_t head_dim, bool causal, int32_t window, bool deterministic = false,
                        int32_t heads_kv = 16, int32_t seq = 16384) {
    BackwardProblem p = problem(head_dim, seq, seq, 1, 16, heads_kv);
    p.is_causal = causal;
    p.window_left = window;
    p.deterministic = deterministic;
    return plan_backward(kH100, p).round;
  };
  for (int32_t head_dim : {64, 128, 256}) {
    CHECK(round(head_dim, true, kUnbounded) == 132 / (head_dim == 256 ? 2 : 1), head_dim);
    CHECK(round(head_dim, false, kUnbounded) == INT32_MAX, "tiles of one length");
    CHECK(round(head_dim, true, 600) == INT32_MAX, "tiles of one length");
    CHECK(round(head_dim, true, kUnbounded, true) == INT32_MAX, "tiles in turn");
    CHECK(round(head_dim, true, kUnbounded, true, 2) <= 132, "tiles in turn, of groups");
    CHECK((round(head_dim, true, kUnbounded, false, 16, 1024) <= 132) == (head_dim == 256),
          "tiles that wait for the first");
    CHECK(round(head_dim, true, kUnbounded, false, 2, 1024) <= 132, "the same of groups");
  }
}

// A query tile's dQ is made when the last of its key tiles has added, which must be plain to see.
CASE(backward_on_hopper_makes_the_gradient_inside_where_it_can_count) {
  const auto check = [&](bool inside, const char* what, void (*set)(BackwardProblem&)) {
    BackwardProblem p = problem(64);
    set(p);
    CHECK(plan_backward(kH100, p).finish_inside == inside, what);
  };
  static const auto lengths = static_cast<const int32_t*>(address(5 << 20));
  check(true, "plain", [](BackwardProblem&) {});
  check(true, "causal", [](BackwardProblem& p) { p.is_causal = true; });
  check(true, "deterministic", [](BackwardProblem& p) { p.deterministic = true; });
  check(true, "ragged keys", [](BackwardProblem& p) { p.seq_kv = 500; });
  check(false, "left", [](BackwardProblem& p) { p.window_left = 600; });
  check(false, "right", [](BackwardProblem& p) { p.window_right = 600; });
  check(false, "chunk", [](BackwardProblem& p) { p.chunk_size = 64; });
  check(false, "offset", [](BackwardProblem& p) { p.query_offset = -1; });
  check(false, "offsets", [](BackwardProblem& p) { p.query_offset_operand.data = lengths; });
  check(false, "prefix", [](BackwardProblem& p) { p.prefix_lengths.data = lengths; });
  check(false, "query lengths", [](BackwardProblem& p) { p.query_seq_lengths.data = lengths; });
  check(false, "key lengths", [](BackwardProblem& p) { p.key_value_seq_lengths.data = lengths; });
  check(false, "scale's gradient",
        [](BackwardProblem& p) { p.dscale_rows = static_cast<float*>(address(6 << 20)); });
  for (int head_dim : {56, 128, 256}) {
    CHECK(!plan_backward(kH100, problem(head_dim)).finish_inside, head_dim);
  }
}

CASE(backward_on_hopper_has_kernels_for_deterministic_sums) {
  const auto of_its_own = [](int32_t head_dim, bool causal) {
    BackwardProblem p = problem(head_dim);
    p.is_causal = causal;
    CHECK(!sm90::kBackwardTiles[plan_backward(kH100, p).variant].deterministic, show(kH100, p));
    p.deterministic = true;
    return sm90::kBackwardTiles[plan_backward(kH100, p).variant].deterministic;
  };
  CHECK(of_its_own(128, true), "128, masks");
  CHECK(!of_its_own(64, true) && !of_its_own(64, false), "64");
  CHECK(!of_its_own(128, false), "128");
}

CASE(backward_on_hopper_writes_zeros_where_pairs_walk_far) {
  for (int32_t head_dim : {64, 128, 256}) {
    for (bool causal : {false, true}) {
      for (int32_t seq_q : {1024, 2048, 4096}) {
        BackwardProblem p = problem(head_dim, seq_q);
        p.is_causal = causal;
        const BackwardPlan plan = plan_backward(kH100, p);
        const bool first = head_dim < 256 || seq_q <= (causal ? 2048 : 1024);
        CHECK(plan.first_stores == first, head_dim << ", " << seq_q);
        p.deterministic = true;
        const int32_t in_turn = plan_backward(kH100, p).variant;
        CHECK(head_dim < 256 || (plan.variant == in_turn) == first, head_dim << ", " << seq_q);
      }
    }
  }
}

CASE(backward_on_hopper_writes_zeros_where_single_blocks_walk_far) {
  const auto check = [](int32_t head_dim, int32_t seq_kv, bool causal, int32_t group,
                        bool stores) {
    BackwardProblem p = problem(head_dim, seq_kv, seq_kv, 1, 16, 16 / group);
    p.is_causal = causal;
    CHECK(plan_backward(kH100, p).first_stores == stores,
          show(kH100, p) << ", causal " << causal << ", group of " << group);
    p.deterministic = true;
    CHECK(plan_backward(kH100, p).first_stores, show(kH100, p) << ", deterministic");
    p.deterministic = false;
    p.window_left = 512;
    CHECK(plan_backward(kH100, p).first_stores, show(kH100, p) << ", a window");
  };
  check(128, 2048, true, 1, true);
  check(128, 4096, true, 1, false);
  check(128, 4096, false, 1, true);
  check(128, 8192, false, 1, false);
  check(64, 8192, true, 1, true);
  check(64, 16384, true, 1, false);
  check(64, 16384, false, 1, true);
  check(64, 32768, false, 1, false);
  check(128, 1024, true, 8, true);
  check(128, 2048, true, 8, false);
  check(128, 512, false, 8, false);
  check(64, 4096, true, 8, true);
  check(64, 8192, true, 8, false);
  check(64, 2048, false, 8, true);
  check(64, 16384, false, 8, true);
  check(64, 32768, false, 8, false);
}

CASE(backward_on_hopper_goes_around_where_walks_are_short) {
  const auto around = [](
                          int32_t head_dim, int32_t seq, int32_t group = 1,
                          void (*set)(BackwardProblem&) = [](BackwardProblem&) {}) {
    BackwardProblem p = problem(head_dim, seq, seq, 1, 16, 16 / group);
    set(p);
    const BackwardPlan plan = plan_backward(kH100, p);
    const bool found = sm90::kBackwardTiles[plan.variant].around;
    CHECK(plan.first_stores || !found, show(kH100, p));
    return found;
  };
  for (int32_t head_dim : {64, 128}) {
    CHECK(around(head_dim, 128) && around(head_dim, 512) && around(head_dim, 2048), head_dim);
    CHECK(around(head_dim, 4096) == (head_dim == 128), head_dim << ": long walks");
    CHECK(!around(head_dim, 8192) && !around(head_dim, 32768, 8), head_dim << ": long walks");
    CHECK(!around(head_dim, 1000), head_dim << ": masks");
    CHECK(!around(head_dim, 512, 8) && around(head_dim, 1024, 8), "tiles for each head");
    CHECK(around(head_dim, 256, 2) && around(head_dim, 2048, 2), "groups of 2");
    CHECK(around(head_dim, 2048, 4) == (head_dim == 64), "groups of 4");
    CHECK(around(head_dim, 4096, 2) == (head_dim == 64), "groups of 2");
    CHECK(around(head_dim, 16384, 8) == (head_dim == 64), "groups of 8");
    CHECK(!around(head_dim, 512, 1, [](BackwardProblem& p) { p.is_causal = true; }), "masks");
    CHECK(!around(head_dim, 512, 1, [](BackwardProblem& p) { p.deterministic = true; }), "turns");
  }
  CHECK(!around(256, 512), "pairs");
}

CASE(backward_on_hopper_has_tiles_for_soft_caps) {
  for (int32_t head_dim : {80, 128, 192, 256}) {
    for (int32_t seq : {100, 1024, 4096}) {
      for (bool causal : {false, true}) {
        for (bool deterministic : {false, true}) {
          BackwardProblem p = problem(head_dim, seq);
          p.is_causal = causal;
          p.deterministic = deterministic;
          CHECK(!sm90::kBackwardTiles[plan_backward(kH100, p).variant].capped, show(kH100, p));
          p.soft_cap = 5.0f;
          check_sound(kH100, p);
          const BackwardPlan plan = plan_backward(kH100, p);
          CHECK(plan.family == 90, show(kH100, p));
          CHECK(sm90::kBackwardTiles[plan.variant].capped, show(kH100, p));
        }
      }
    }
  }
}

CASE(backward_on_hopper_leaves_the_rest_to_sm80) {
  const auto check = [&](const char* what, void (*set)(BackwardProblem&)) {
    BackwardProblem p = problem();
    set(p);
    CHECK(plan_backward(kH100, p).family == 80, what);
  };
  static const void* some = address(5 << 20);
  check("soft cap at head_dim 64", [](BackwardProblem& p) {
    p = problem(64);
    p.soft_cap = 5.0f;
  });
  check("slopes",
        [](BackwardProblem& p) { p.alibi_slopes.data = static_cast<const float*>(some); });
  check("deterministic with segments", [](BackwardProblem& p) {
    p.query_segment_ids.data = p.key_value_segment_ids.data = static_cast<const int32_t*>(some);
    p.deterministic = true;
  });
  check("segments and slopes", [](BackwardProblem& p) {
    p.query_segment_ids.data = p.key_value_segment_ids.data = static_cast<const int32_t*>(some);
    p.alibi_slopes.data = static_cast<const float*>(some);
  });
  check("no keys", [](BackwardProblem& p) { p.seq_kv = 0; });
  check("no queries", [](BackwardProblem& p) { p.seq_q = 0; });
}

// Whether ids are packed is known on the device alone.
CASE(backward_of_segments_on_hopper_has_both_families) {
  for (int head_dim : {40, 64, 128, 256}) {
    for (int seq : {100, 512, 4096}) {
      BackwardProblem p = problem(head_dim, seq, seq + 28);
      p.query_segment_ids.data = p.key_value_segment_ids.data =
          static_cast<const int32_t*>(address(5 << 20));
      check_sound(kH100, p);
      const BackwardPlan plan = plan_backward(kH100, p);
      CHECK(plan.family == 90 && sm90::kBackwardTiles[plan.variant].masked, show(kH100, p));
      CHECK(!sm90::kBackwardTiles[plan.variant].turns && !plan.first_stores, show(kH100, p));
      CHECK(!plan.finish_inside && !plan.transposed_sums, show(kH100, p));
      CHECK(plan.otherwise.size() == 1, show(kH100, p));
      const BackwardPlan& otherwise = plan.otherwise.front();
      CHECK(otherwise.family == 80 && otherwise.general && !otherwise.finish_inside, "");
      CHECK(otherwise.workspace.bytes == plan.workspace.bytes, "");
      const SegmentWorkspace w = segment_workspace(p.batch, p.seq_q, p.seq_kv);
      CHECK(plan.workspace.segments % 16 == 0, plan.workspace.segments);
      CHECK(plan.workspace.segments + w.bytes == plan.workspace.bytes, plan.workspace.bytes);
      CHECK(plan_backward(kH100, p, 80).otherwise.empty(), show(kH100, p));
      for (const Device& d : kDevices) {
        if (d.compute_capability == 90) continue;
        CHECK(plan_backward(d, p).family == 80 && plan_backward(d, p).otherwise.empty(), "");
      }
      p.soft_cap = 5.0f;
      const BackwardPlan capped = plan_backward(kH100, p);
      const bool hopper = plan.head_dim > 64;
      CHECK(capped.family == (hopper ? 90 : 80), show(kH100, p));
      CHECK(!hopper || sm90::kBackwardTiles[capped.variant].capped, show(kH100, p));
      CHECK(capped.otherwise.size() == (hopper ? 1 : 0), show(kH100, p));
    }
  }
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
