// Replicas in proportion to load, heavy ones placed first, each on a rank that is about the least
// loaded and links the pair graph. For loads that will differ from the ones at hand, and for known
// ones where slots are too few for the construction. Integers only, ties by index.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

#include "counts.hpp"
#include "shape.hpp"

namespace laer {

// Slots for counts by node; any shape that admits a layout. Every node is served on its own where
// its slots suffice for all experts and one more replica per rank.
std::vector<int16_t> proportional(const Shape& shape, const Sums& sums, Purpose purpose);

// For a forecast: every node hosts its largest experts, at most `most_experts` (see node_shares.hpp)
// and no more than its slots, and replicates them for the tokens that it takes. Fewer tokens leave
// their node than with replicas placed over all nodes, and what of the node's slots is left beside
// its experts links its ranks.
std::vector<int16_t> proportional_by_node(const Shape& shape, const Sums& sums, int most_experts);

}  // namespace laer
