// Exact quotas: for given counts and a given layout, the loads of all slots (slot_loads.cpp), and
// from them one rank's row and columns (token_split.cpp). Integers only, ties by index. It does not
// choose layouts.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

#include "counts.hpp"
#include "replicas.hpp"
#include "shape.hpp"

namespace laer {

// Sums over sources or slots. Near tokens stay in their node, own ones among them; far tokens go to
// another node.
struct Totals {
  std::vector<int64_t> near_S, far_S, sent_near_N, sent_far_N, own_N;
};

// Throws std::invalid_argument, in Python ValueError, if a count is negative.
Sums sums_of(const Shape& shape, const int64_t* counts_NE);

// Tokens of all nodes for each expert, [E].
std::vector<int64_t> expert_loads(const Shape& shape, const int64_t* node_counts_QE);

// Tokens that each slot computes, [S]: the largest rank load is minimal, then tokens that leave
// their node are minimal, then, keeping how many tokens of each expert every node takes, tokens
// that leave their rank. Without `by_rank`, which takes half of the time, the last of these are not
// minimal.
std::vector<int64_t> slot_loads(const Shape& shape, const Counts& counts, const Replicas& replicas,
                                bool by_rank = true);

// The largest load of a rank, the sum of its slots.
int64_t largest_load(const Shape& shape, const std::vector<int64_t>& loads_S);

// Tokens that a source rank sends to each slot, [S].
void rank_row(const Shape& shape, const Counts& counts, const Replicas& replicas,
              const int64_t* loads_S, int rank, int64_t* row_S);

// Tokens that each source rank sends to the slots of a rank, [N, C].
void rank_columns(const Shape& shape, const Counts& counts, const Replicas& replicas,
                  const int64_t* loads_S, int rank, int64_t* columns_NC);

Totals totals(const Shape& shape, const Counts& counts, const Replicas& replicas,
              const int64_t* loads_S);

}  // namespace laer
