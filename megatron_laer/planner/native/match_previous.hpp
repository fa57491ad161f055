// Matches a new layout to the one in use: the same layout with as much as possible where it was.
// Ranks of a node trade places, slots of a rank too. Neither loads nor tokens between nodes change,
// and so no rank's experts move to another node.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

#include "shape.hpp"

namespace laer {

void match_previous(const Shape& shape, const int16_t* current_S, std::vector<int16_t>& slots_S);

}  // namespace laer
