// Layouts of home experts: the first slots of a rank have its own experts, the others replicas of
// experts of other ranks, or nothing.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

#include "shape.hpp"

namespace laer {

// Stock's placement: every replica slot is empty.
std::vector<int16_t> at_home(const Shape& shape);

}  // namespace laer
