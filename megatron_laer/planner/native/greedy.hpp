// Layouts for forecasts, by how scarce slots are: connected pair graphs with fewer than two spare
// slots per rank, replicas in proportion to load with more.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

#include "shape.hpp"

namespace laer {

// Slots for counts by node.
std::vector<int16_t> greedy(const Shape& shape, const int64_t* node_counts_QE);

}  // namespace laer
