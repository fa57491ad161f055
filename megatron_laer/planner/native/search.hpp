// A layout that stays balanced when loads drift: the best of several over disturbed copies of the
// forecast, improved by single exchanges. Slower than the construction, for the background.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

#include "shape.hpp"

namespace laer {

struct Effort {
  int scenarios;   // disturbed copies that a layout is judged on
  int candidates;  // layouts made for further disturbed copies
  int exchanges;   // tries to improve the best of them
};

// Slots for counts by node, `current` among the candidates. The same seed gives the same layout.
std::vector<int16_t> search(const Shape& shape, const int64_t* node_counts_QE,
                            const int16_t* current_S, const Effort& effort, uint64_t seed);

}  // namespace laer
