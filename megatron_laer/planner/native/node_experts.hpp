// Which experts are in which node so that few rows travel between nodes, from counts of pairs.
// Loads of ranks inside a node are no business of this file.
//
// Legend: E experts, Q nodes.
#pragma once

#include <cstdint>
#include <vector>

#include "crossings.hpp"

namespace laer {

// Returns the node of each expert, as many on each node. Swaps experts for pairs inside nodes from
// several starts, and then anneals by expected rows.
std::vector<int> choose_nodes(const Pairs& pairs, int steps, uint64_t seed);

}  // namespace laer
