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
  int node_size;
  std::vector<int> begin_E, slot, rank;

  Replicas(const Shape& shape, const int16_t* layout_S)
      : slots_S(layout_S), node_size(shape.node_size) {
    std::vector<int> last_rank_E(shape.experts, -1);
    std::vector<char> first_S(shape.slots(), 0);
    begin_E.assign(shape.experts + 1, 0);
    for_slots(shape, [&](int s, int of_rank) {
      const int expert = slots_S[s];
      if (expert == kEmpty) return;
      first_S[s] = last_rank_E[expert] != of_rank;
      last_rank_E[expert] = of_rank;
      begin_E[expert + 1] += first_S[s];
    });
    for (int e = 0; e < shape.experts; ++e) begin_E[e + 1] += begin_E[e];
    slot.resize(begin_E[shape.experts]);
    rank.resize(slot.size());
    std::vector<int> place(begin_E.begin(), begin_E.end() - 1);
    for_slots(shape, [&](int s, int of_rank) {
      if (!first_S[s]) return;
      const int at = place[slots_S[s]]++;
      slot[at] = s;
      rank[at] = of_rank;
    });
  }

  // The end of an expert's replicas in a node, from their first one on.
  int end_in(int node, int expert, int first) const {
    while (first < begin_E[expert + 1] && rank[first] < (node + 1) * node_size) ++first;
    return first;
  }

  // Calls visit(node, first replica, end) for each node with replicas of an expert, in order.
  template <typename Visit>
  void for_nodes(int expert, Visit visit) const {
    for (int first = begin_E[expert]; first < begin_E[expert + 1];) {
      const int node = rank[first] / node_size, end = end_in(node, expert, first);
      visit(node, first, end);
      first = end;
    }
  }

 private:
  template <typename Visit>
  static void for_slots(const Shape& shape, Visit visit) {
    for (int of_rank = 0, s = 0; of_rank < shape.ranks; ++of_rank) {
      for (int c = 0; c < shape.capacity; ++c) visit(s++, of_rank);
    }
  }
};

}  // namespace laer
