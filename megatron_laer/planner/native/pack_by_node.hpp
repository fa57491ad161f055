// Packs experts by node and then by rank, for slots to spare: each node hosts its largest experts,
// as many as it can balance over its own ranks. Its counterpart for scarce slots is pack_scarce.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>

#include "rank_contents.hpp"
#include "shape.hpp"

namespace laer {

// Fills `contents` so that no rank needs more than `cap`; returns false, and leaves `contents` as it
// was, if nodes cannot be balanced that way.
bool pack_by_node(const Shape& shape, const int64_t* node_counts_QE, int64_t cap,
                  RankContents& contents);

}  // namespace laer
