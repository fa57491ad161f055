// The runs of rows between which a rank's tokens move, from its row and columns of the quotas. What
// they mean is told in dispatch/permutation.py, and defined by planner/reference.py.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots.
#pragma once

#include <cstdint>
#include <vector>

#include "shape.hpp"

namespace laer {

// Where each part begins in the packed integers.
struct TokenRuns {
  explicit TokenRuns(const Shape& shape)
      : arrivals(4 * shape.slots() + shape.experts + 1),
        sources(arrivals + 4 * shape.slots()),
        size(sources + 2 * shape.slots()) {}

  int arrivals, sources, size;  // of slots: from 0 on
};

void token_runs(const Shape& shape, const int16_t* slots_S, const int64_t* row_S,
                const int64_t* columns_NC, int32_t* runs);

}  // namespace laer
