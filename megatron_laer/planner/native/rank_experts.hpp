// Which rank of a node has which of the node's experts, so that ranks are balanced for loads that
// drift. Experts of nodes are chosen in node_experts.hpp.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, X loads.
#pragma once

#include <cstdint>
#include <vector>

#include "crossings.hpp"
#include "disturb.hpp"
#include "node_experts.hpp"
#include "shape.hpp"

namespace laer {

// Slots of ranks, home experts first. Experts are dealt by load and exchanged inside nodes until
// ranks are even. Then slots change places, or experts, while an exact split could not balance one
// of `loads_XE`, for few more rows: at most so many tries. `crossings` has the result's experts.
std::vector<int16_t> choose_ranks(const Shape& shape, const Pairs& pairs,
                                  const NodeExperts& experts,
                                  const std::vector<std::vector<int64_t>>& loads_XE, int tries,
                                  Random& random, Crossings& crossings);

}  // namespace laer
