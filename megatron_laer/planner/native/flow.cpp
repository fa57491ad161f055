// The graph that both flow problems share; they are solved in load_flow.cpp and foreign_flow.cpp.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node,
// U suppliers.
#include "flow.hpp"

namespace laer {

void FlowGraph::index() {
  group_begin.push_back(groups());
  pair_begin.push_back(pairs());
  taken_N.resize(ranks);
  group_supplier.resize(groups());
  for (int u = 0; u < suppliers(); ++u) {
    for (int group = group_begin[u]; group < group_begin[u + 1]; ++group) group_supplier[group] = u;
  }
  pair_group.resize(pairs());
  for (int group = 0; group < groups(); ++group) {
    for (int pair = pair_begin[group]; pair < pair_begin[group + 1]; ++pair) {
      pair_group[pair] = group;
    }
  }
  rank_begin.assign(ranks + 1, 0);
  for (int rank : pair_rank) ++rank_begin[rank + 1];
  for (int rank = 0; rank < ranks; ++rank) rank_begin[rank + 1] += rank_begin[rank];
  std::vector<int> place(rank_begin.begin(), rank_begin.end() - 1);
  rank_pair.resize(pairs());
  for (int pair = 0; pair < pairs(); ++pair) rank_pair[place[pair_rank[pair]]++] = pair;
}

}  // namespace laer
