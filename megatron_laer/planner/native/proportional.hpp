// Layouts for loads that will differ from the ones at hand: replicas in proportion to load, heavy
// replicas placed first, each on the least loaded rank. Integers only, ties by index.
#pragma once

#include <cstdint>
#include <vector>

#include "quotas.hpp"

namespace laer {

// Slots for counts by node; any shape that admits a layout. Every node is served on its own where
// its slots suffice for all experts and one more replica per rank.
std::vector<int16_t> proportional(const Shape& shape, const int64_t* node_counts_QE);

}  // namespace laer
