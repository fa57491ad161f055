// Which experts each node hosts, and how many of their tokens it takes: the part of a layout that
// decides how many tokens leave their node. Ranks inside a node are no business of this file: see
// pack_by_node and proportional.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

#include "shape.hpp"

namespace laer {

struct NodeShares {
  std::vector<char> hosted_QE;
  std::vector<int64_t> tokens_QE;  // that each node takes, 0 where it does not host the expert
  bool is_balanced;                // whether no node takes more than its ranks can carry
};

// Every node hosts its largest experts, at most `most_experts` of them, and all nodes together host
// each expert at least once: this needs Q * most_experts >= E. Nodes take as equal numbers of
// tokens as that allows, at most `cap` for each rank if possible, and then as few as can be from
// other nodes: that is left out with `needs_balance` where they take more.
NodeShares share_among_nodes(const Shape& shape, const int64_t* node_counts_QE, int64_t cap,
                             int most_experts, bool needs_balance = false);

}  // namespace laer
