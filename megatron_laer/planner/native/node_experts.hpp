// Which experts are in which node so that few rows travel between nodes, from counts of pairs.
// Ranks are chosen in rank_experts.hpp.
//
// Legend: E experts, Q nodes.
#pragma once

#include <cstdint>
#include <vector>

#include "crossings.hpp"
#include "disturb.hpp"

namespace laer {

// Main places, one of each expert, and replicas: other experts of a node. The experts of a node
// differ.
struct NodeExperts {
  std::vector<std::vector<int>> main_Q, replicas_Q;
};

// Swaps main places for pairs inside nodes from several starts, fills nodes with replicas, and then
// anneals both by expected rows. `crossings` has the experts of the result.
NodeExperts choose_nodes(const Pairs& pairs, int slots_per_node, int steps, Random& random,
                         Crossings& crossings);

}  // namespace laer
