// Which experts are in which node so that few rows travel between nodes, from counts of pairs.
// Loads of ranks inside a node are no business of this file.
//
// Legend: E experts, Q nodes.
#pragma once

#include <cstdint>
#include <vector>

#include "crossings.hpp"

namespace laer {

// Returns the experts at home in each node. Swaps homes for pairs inside nodes from several starts,
// fills nodes with replicas, other experts than theirs, and then anneals both by expected rows.
std::vector<std::vector<int>> choose_nodes(const Pairs& pairs, int slots_per_node, int steps,
                                           uint64_t seed);

}  // namespace laer
