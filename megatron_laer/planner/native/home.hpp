// Layouts of home experts for known counts: stock's placement, and replicas that balance it. How is
// told in home.cpp; which of several such layouts pays is decided in home_choice.hpp. Integers only,
// ties by index.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node, H = E/N
// home slots.
#pragma once

#include <cstdint>
#include <vector>

#include "counts.hpp"
#include "shape.hpp"

namespace laer {

// A layout and loads of its slots that add up to the counts; exact quotas may find better ones.
struct HomeLayout {
  std::vector<int16_t> slots_S;
  std::vector<int64_t> loads_S;
  int64_t largest = 0;      // load of a rank
  int replicas = 0;         // slots that are used besides home slots
  bool is_ideal = false;    // whether the largest load is ceil(total / N)
  bool is_hidden = false;   // whether the host hides its imbalance
};

// Stock's placement: every replica slot is empty.
std::vector<int16_t> at_home(const Shape& shape);
HomeLayout stock_placement(const Shape& shape, const Sums& sums);

// ceil(total / N), below which no largest load can be.
int64_t ideal_load(const Shape& shape, const Sums& sums);

// Replicas with which no rank has to carry more than `level` tokens, if that is reached. A level
// below ceil(total / N) counts as that, the ideal. No rank carries more than under stock's placement.
HomeLayout replicate(const Shape& shape, const Sums& sums, int64_t level);

// What a free slot is for: load that drifts has more ways to flow with more holders of an expert; and
// tokens of a node whose ranks do not hold the expert stay in the node with it.
enum class Fill { kLoadAndNode, kNode };

// Uses replica slots, `most` of each rank, for more than these counts need: ranks in turn, those with
// least load at home first, each with the expert of most tokens among those that it lacks: tokens per
// holder, if load counts, and the node's own. Slots that are used stay as they are.
void fill_slots(const Shape& shape, const Sums& sums, int most, Fill fill,
                std::vector<int16_t>& slots_S);

}  // namespace laer
