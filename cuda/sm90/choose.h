// The sm90 family's part of the plan.
#pragma once

#include <cstddef>

#include "plan.h"
#include "problem.h"

namespace flash2::sm90 {

// Whether something but the arrays' ends decides which keys a row sees.
bool has_masks(const Problem& problem);

// Whether the family serves this problem, which breaks no rule, on this device.
bool serves(const Device& device, const ForwardProblem& problem);

// Chooses the tile and what follows from it alone; grid and order of the tiles are the caller's.
void choose_tile(const ForwardProblem& problem, ForwardPlan* plan);

// Sections of the plan's size at most, and where the last begins, of `packs` in all.
void choose_sections(const Device& device, int64_t packs, ForwardPlan* plan);

// Whether the blocks take their tiles from a counter in the workspace.
bool counts_tiles(const ForwardPlan& plan);

inline constexpr size_t kCounterBytes = 16;

// A consumer's 64 rows are whole positions, so that one box brings them.
inline constexpr int32_t kMostPackedHeads = 64;

// Blocks of a cluster, as many as every device has room for; and numbers of K for each at least:
// they must take long beside a block's start and the joining of its output.
inline constexpr int32_t kMostSplits = 8;
// Rows of a pack whose keys are shared out, in one tile or two.
inline constexpr int32_t kMostJoinedRows = 128;
inline constexpr int32_t kLeastShare = 2048 * 128;

// Heads that are walked together: no more than run at once at short lengths, or each would read
// its K and V from memory alone, and the sections' first tiles would wait for it.
inline constexpr int32_t kMostSectionHeads = 8;

}  // namespace flash2::sm90
