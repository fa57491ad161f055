// The guard's choice for one microbatch: the planned layout, or a fresh one made for its counts.
// planner/guard.py tells what the modes mean.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

#include "costs.hpp"
#include "shape.hpp"

namespace laer {

enum class Mode { kForecast, kExact, kByCost, kByTolerance };

struct Decision {
  std::vector<int16_t> fresh_S;        // empty where the planned layout is kept
  std::vector<int64_t> loads_S;        // of the layout that was chosen
  std::vector<int64_t> kept_loads_S;   // of the planned one, where another was chosen after it
  bool solved = false;                 // whether a fresh layout was made
  bool is_priced = false;              // whether the two that follow were compared
  double gain_s = 0, cost_s = 0;
};

// `costs` is for kByCost, and for kExact with home experts; `tolerance` for kByTolerance.
Decision decide(const Shape& shape, Mode mode, const CostModel& costs, double tolerance,
                const Counts& counts, const int16_t* planned_S);

}  // namespace laer
