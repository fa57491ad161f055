// Exchanges of experts as chains of holdings, which planner/hops.py describes: the hops of a layout,
// and the rows that one rank sends and receives in each.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, G ranks per node. R rows of a matrix.
#pragma once

#include <cstdint>
#include <vector>

#include "shape.hpp"

namespace laer {

// Ranks that a hop connects: all, those of one local rank on all nodes, or those of a node.
// planner/hops.py has the same numbers.
enum Link { kAll, kBetween, kInside };

// A chain of holdings from the owners to the slots.
struct Way {
  Shape shape;
  std::vector<int> widths;  // ranks that share a place of each holding
  std::vector<int> links;   // of the hop from each holding to the next
  int blocks;               // row blocks of a matrix
};

// A place, and the position of an expert among those of the place.
struct Spot {
  int place, at;
};

struct Transfer {
  Spot source, target;
};

// Experts that places of one holding send to places of the next, in order of the latter. The source
// may be the slots as they were before.
struct Hop {
  int link;
  int source_width, target_width;
  bool is_kept;
  std::vector<Transfer> transfers;
};

// The hops of a restore, from the owners on. With `before_S`, the layout whose experts the slots have,
// only others are fetched, and a hop from these slots follows the one to the nodes.
std::vector<Hop> hops(const Way& way, const int16_t* slots_S, const int16_t* before_S);

// Elements that each rank exchanges in a restore with others in its node and beyond it.
struct Traffic {
  explicit Traffic(int ranks)
      : near_N(ranks, 0), far_N(ranks, 0), sent_near_N(ranks, 0), sent_far_N(ranks, 0) {}

  std::vector<int64_t> near_N, far_N, sent_near_N, sent_far_N;
};

// Sums over the hops of a restore; `held_N` has the elements of each of an expert's N row blocks.
Traffic traffic(const std::vector<Hop>& hops, int node_size, const std::vector<int64_t>& held_N);

// A matrix of an expert: its rows, and how many rows of a table each of them is.
struct Matrix {
  int64_t rows, width;
};

// Segments of rows that are both in a holding and on the wire, in a table: four integers each
// (tensor of the holding, row in it, row on the wire, rows), in ascending order. Tensors are numbered
// among those that have any. Segments of the same rows of the holding are parts of a sum, in the
// order of addition. Behind them the table has the first segment of each sum, and their number.
struct Segments {
  int64_t at;  // in the table
  int64_t count, sums, rows, most_rows;
  int64_t in_place;  // the first row, if all lie in one piece as on the wire, or -1
  std::vector<int64_t> tensors;
};

// Rows of an expert's matrices that a rank sends and receives in one hop. Where the link has one
// rank, nothing is sent, and the wire of each end is the other's holding.
struct Move {
  int link, holding;  // the number of the holding that it fills, behind the owners
  bool is_kept, is_first, is_last;
  std::vector<int64_t> sent_P, received_P;  // to and from each rank of the link
  Segments leaves, arrives;
};

// The moves of a rank, the rows of its holdings between owners and slots, and the owned tensors that
// it sends from or receives into.
struct Moves {
  std::vector<Move> moves;
  std::vector<int64_t> held_rows;
  std::vector<int64_t> owned;
  std::vector<int64_t> table;
};

Moves rank_moves(const Way& way, const std::vector<Hop>& hops, int rank,
                 const std::vector<Matrix>& matrices);

}  // namespace laer
