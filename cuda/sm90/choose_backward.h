// The sm90 family's part of the backward's plan.
#pragma once

#include "plan.h"
#include "problem.h"

namespace flash2::sm90 {

// Whether the family serves this problem, which breaks no rule, on this device.
bool serves(const Device& device, const BackwardProblem& problem);

// Chooses the tile and what follows from it alone; grid and order of the tiles are the caller's.
void choose_tile(const BackwardProblem& problem, BackwardPlan* plan);

// Whether the main kernel makes dQ from its sums by itself, with this tile.
bool finishes_inside(const BackwardProblem& problem, const BackwardPlan& plan);

// Of this many key heads, how many are walked together, where `cached` fit the L2 cache.
int32_t section(const Device& device, const BackwardProblem& problem, const BackwardPlan& plan,
                int64_t heads, int64_t cached);

// Whether a head has so few tiles that those of several are at work at once.
bool few_tiles(const Device& device, const BackwardPlan& plan);

// Key tiles that are at work at once.
int32_t round(const Device& device, const BackwardPlan& plan);

// Blocks of the main kernel for this many key tiles.
int64_t grid(const Device& device, const BackwardPlan& plan, int64_t tiles);

}  // namespace flash2::sm90
