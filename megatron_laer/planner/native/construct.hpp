// Layouts made for known counts: every rank can carry at most ceil(total / N) tokens wherever
// C >= ceil(E / N) + 1, and few tokens leave their node. Integers only, ties by index. Why that is
// possible is proved in pack_scarce.hpp; layouts for forecasts are in greedy.hpp.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

#include "costs.hpp"
#include "shape.hpp"

namespace laer {

// Whether the theorem in pack_scarce.hpp holds: E <= N*(C-1) + 1.
bool can_balance(const Shape& shape);

// Slots for counts by node. Needs can_balance(shape).
std::vector<int16_t> construct(const Shape& shape, const Sums& sums, Purpose purpose);

struct Fresh {
  std::vector<int16_t> slots_S;
  std::vector<int64_t> loads_S;  // whose largest is minimal; empty where a flow has to find them
};

// For these very counts and any shape: with too few slots for the theorem, replicas in proportion
// to load. Next to home experts, replicas that pay by `costs`, or without it all that balance.
Fresh fresh(const Shape& shape, const CostModel* costs, const Counts& counts);

}  // namespace laer
