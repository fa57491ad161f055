// Packs experts onto all ranks at once, for scarce slots, where nodes cannot balance themselves.
// Its counterpart, with slots to spare, is pack_by_node.hpp.
//
// Theorem. With E <= N*(C-1) + 1, all tokens can be given to ranks that host their expert such that
// no rank hosts more than C experts or gets more than cap = ceil(total / N) tokens.
//
// Proof, and invariant of the code. Ranks are filled one after the other. While n ranks are open,
//   (items)   at most n*(C-1) + 1 items are open,
//   (tokens)  at most n*cap tokens are open.
// where an item is tokens of one expert that no rank has yet (window.hpp). Both hold at the start,
// when n = N and each expert is one item. A choice is legal for a rank if the rank takes
//   * C - 1 items whole, or fewer by at most the items missing to n*(C-1) + 1 (`spare_items`),
//   * and a part of one more item, the split item, whose rest stays open as an item,
//   * at most `cap` tokens, and at least what the n - 1 other ranks cannot carry (`least_tokens`);
// then both hold for these n - 1. The window over all open items is legal (lemma in window.hpp), so
// every rank has a choice, and the last one takes all that is open. As any legal choice will do,
// each rank takes the cheapest one that is found, in tokens off their node.
//
// Algorithm.
//   1   Open the items: one per expert, but the largest shares of nodes become items of their own
//       ("home items"), as many as the first invariant admits. The others are "mixed".
//   2   For each rank, nodes taking turns:
//   2a    compute the bounds that make a choice legal, `spare_items` and `least_tokens`;
//   2b    among home items of the rank's node and mixed items, find the cheapest legal choice:
//           for each of the few items with most tokens in the node, as the split item:
//             take the smallest other items whole, all but two;
//             for each two others (where `spare_items` allow it, for one or none):
//               take the split item's tokens in the node, more or fewer where the bounds say so;
//   2c    if there is none, choose the window over all open items;
//   2d    take it: whole items are closed, the rest of the split item stays open.
//   3   Free slots are filled (RankContents::finish).
//
// One split serves balance and locality at the same time: the rest of a split item often goes to a
// rank of another node that has tokens for it. Phases 1 and the items' part of 2d are in
// open_items.cpp, 2b is in rank_choice.cpp, and the loop is in pack_scarce.cpp.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>

#include "rank_choice.hpp"
#include "rank_contents.hpp"
#include "shape.hpp"

namespace laer {

// Fills `contents` so that no rank needs more than `cap`.
void pack_scarce(const Shape& shape, const int64_t* node_counts_QE, int64_t cap,
                 const PackingWeights& weights, RankContents& contents);

}  // namespace laer
