// Exact quotas: for given counts and a given layout, the loads of all slots, and from them one
// rank's row and columns. Integers only, ties by index. It does not choose layouts.
//
// Shape suffixes: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

namespace laer {

struct Shape {
  int ranks;
  int experts;
  int capacity;
  int node_size;

  int slots() const { return ranks * capacity; }
  int nodes() const { return ranks / node_size; }
};

// What a layout is made for: these very counts, or ones that will differ somewhat.
enum class Purpose { kNow, kForecast };

struct Totals {
  std::vector<int64_t> near_S, far_S, sent_near_N, sent_far_N, own_N;
};

// Tokens of each node for each expert, [Q, E].
void node_counts(const Shape& shape, const int64_t* counts_NE, int64_t* node_counts_QE);

// Tokens that each slot computes, [S]: the largest rank load is minimal, then tokens that leave
// their node are minimal, then, keeping how many tokens of each expert every node takes, tokens
// that leave their rank.
void slot_loads(const Shape& shape, const int64_t* counts_NE, const int64_t* node_counts_QE,
                const int16_t* slots_S, int64_t* loads_S);

void rank_row(const Shape& shape, const int64_t* counts_NE, const int64_t* node_counts_QE,
              const int16_t* slots_S, const int64_t* loads_S, int rank, int64_t* row_S);

void rank_columns(const Shape& shape, const int64_t* counts_NE, const int64_t* node_counts_QE,
                  const int16_t* slots_S, const int64_t* loads_S, int rank, int64_t* columns_NC);

Totals totals(const Shape& shape, const int64_t* counts_NE, const int64_t* node_counts_QE,
              const int16_t* slots_S, const int64_t* loads_S);

}  // namespace laer
