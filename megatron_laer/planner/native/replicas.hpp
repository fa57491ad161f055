// The slots of each expert in a layout: the lists that both halves of the exact quotas walk along.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

#include "shape.hpp"

namespace laer {

// Replicas by expert, [E + 1] and [S], by rank; empty slots and a second slot of an expert on a rank
// are left out.
struct Replicas {
  const int16_t* slots_S;  // of the layout, which must outlive this
  std::vector<int> begin_E, slot;

  Replicas(const Shape& shape, const int16_t* layout_S) : slots_S(layout_S) {
    const int slots = shape.slots();
    std::vector<int> last_rank_E(shape.experts, -1);
    std::vector<char> first_S(slots, 0);
    begin_E.assign(shape.experts + 1, 0);
    for (int s = 0; s < slots; ++s) {
      const int expert = slots_S[s], rank = s / shape.capacity;
      if (expert == kEmpty) continue;
      first_S[s] = last_rank_E[expert] != rank;
      last_rank_E[expert] = rank;
      begin_E[expert + 1] += first_S[s];
    }
    for (int e = 0; e < shape.experts; ++e) begin_E[e + 1] += begin_E[e];
    slot.resize(begin_E[shape.experts]);
    std::vector<int> place(begin_E.begin(), begin_E.end() - 1);
    for (int s = 0; s < slots; ++s) {
      if (first_S[s]) slot[place[slots_S[s]]++] = s;
    }
  }
};

}  // namespace laer
