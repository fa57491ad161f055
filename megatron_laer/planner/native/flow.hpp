// The two flow problems behind exact quotas, on the (supplier, group, rank) graph of a layout.
//
// A supplier has tokens for one expert; each group of it (a node, or a rank) owns some of them, and
// reaches ranks by pairs, one for each rank that hosts the expert. What a group takes beyond its
// own tokens is foreign. Sources: Dinic's maximum flow; for the second problem successive shortest
// paths by distance classes (primal-dual) after all foreign arcs were undone.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node,
// U suppliers.
#pragma once

#include <cstdint>
#include <vector>

namespace laer {

// Pairs of group g are pair_begin[g] .. pair_begin[g + 1] - 1, groups of supplier u likewise.
struct FlowGraph {
  int ranks = 0;
  std::vector<int> group_begin;     // [U + 1]
  std::vector<int> group_supplier;  // [groups]
  std::vector<int> pair_begin;      // [groups + 1]
  std::vector<int> pair_group;      // [pairs]
  std::vector<int> pair_rank;       // [pairs]
  std::vector<int> pair_slot;       // [pairs], where ranks have slots
  std::vector<int> rank_begin;      // [N + 1]
  std::vector<int> rank_pair;       // pairs of each rank
  std::vector<int64_t> supply;      // [U]
  std::vector<int64_t> own;         // [groups]
  std::vector<int64_t> taken_N;     // tokens of experts without a choice, which only take up room

  int suppliers() const { return static_cast<int>(supply.size()); }
  int groups() const { return static_cast<int>(own.size()); }
  int pairs() const { return static_cast<int>(pair_rank.size()); }
  // Ends group_begin and pair_begin, and fills what follows from these and pair_rank.
  void index();
};

// Flow on pairs that sends every supply and minimises the largest rank load; returns that load.
// `flow` is the start on entry (it may leave supply unsent and must keep ranks within `cap`).
int64_t minimise_largest_load(const FlowGraph& graph, int64_t cap, std::vector<int64_t>& flow);

// Changes a complete flow so that as few tokens as possible are foreign, ranks within their caps.
void minimise_foreign(const FlowGraph& graph, const std::vector<int64_t>& cap_N,
                      std::vector<int64_t>& flow);

}  // namespace laer
