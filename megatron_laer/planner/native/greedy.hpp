// Layouts for forecasts: one that holds up under drift, and the choice by predicted time between
// that one and two that keep more tokens in their node.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

#include "costs.hpp"
#include "shape.hpp"

namespace laer {

// By how scarce slots are: connected pair graphs with fewer than two spare slots per rank, replicas
// in proportion to load with more.
std::vector<int16_t> for_drift(const Shape& shape, const Sums& sums);

// The fastest by the cost model, over the forecast and disturbed copies of it, of for_drift, the
// construction for known counts (with fewer than two spare slots per rank), and replicas in
// proportion inside each node. Nothing is compared where each node can host all experts, as then no
// token leaves its node for want of one.
std::vector<int16_t> greedy(const Shape& shape, const CostModel& costs, const int64_t* counts_NE,
                            const Sums& sums);

}  // namespace laer
