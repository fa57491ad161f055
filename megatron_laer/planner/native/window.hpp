// The window argument: how to fill one rank such that the ranks after it can be filled as well. It
// knows nothing of nodes and of what tokens off their node cost: see pack_by_node and pack_scarce.
//
// Packing. Ranks are bins of `cap` tokens. An item is tokens of one expert that no rank has yet. A
// rank takes C - 1 items whole and a part of one more, the split item, of which the rest stays
// open; so it hosts at most C experts.
//
// Lemma. Let n ranks be open, and at most n*(C-1) + 1 items with at most n*cap tokens. Then one
// rank can take C - 1 items and a part of one more, at most `cap` tokens, such that at most
// (n-1)*(C-1) + 1 items with at most (n-1)*cap tokens are left. (Fewer items are taken whole where
// empty ones would have to be added to make up the number.)
//
// Proof. Add empty items until there are n*(C-1) + 1, and sort them. The C - 1 smallest ones fit:
// of n groups of C - 1 items they are the one with fewest tokens. Slide this window of neighbours
// upwards while it fits. Either the item above it fills the rank up, and is split or finished:
// exactly `cap` tokens are gone. Or it is the largest item of all and does not fill the rank up:
// then it is taken whole, and the items below the window are n - 1 groups of C - 1, none with more
// tokens than the window had, hence with at most (n-1)*cap together. Both ways C - 1 items are
// gone, besides the split one.
//
// Source: for C = 2 and n items this is the alias method (A. J. Walker, ACM Transactions on
// Mathematical Software 3(3), 1977), where each column has one item whole and fills up with a part
// of another. With more slots per rank, a window takes the place of the one whole item.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace laer {

// Tokens of one expert that no rank has yet.
struct Item {
  int64_t tokens;
  int expert;
  int home;  // the one node that all of them come from, or kMixed

  static constexpr int kMixed = -1;  // from several nodes

  bool is_mixed() const { return home == kMixed; }

  friend bool operator<(const Item& a, const Item& b) {
    if (a.tokens != b.tokens) return a.tokens < b.tokens;
    return a.expert != b.expert ? a.expert < b.expert : a.home < b.home;
  }
};

// Positions of what a rank takes: items from `first` up to `split_item` whole, and of the split
// item as much as fits.
struct Window {
  int first, split_item;
  int64_t whole_tokens;
};

// The window of the lemma over ascending items, of which `num_whole` = C - 1 are taken whole. Empty
// items that the lemma adds are thought of as in front of the others.
inline Window find_window(const std::vector<Item>& items, int num_whole, int64_t open_ranks,
                          int64_t cap) {
  const int open = static_cast<int>(items.size());
  const int64_t missing = std::max<int64_t>(open_ranks * num_whole + 1 - open, 0);
  int first = -static_cast<int>(std::min<int64_t>(missing, num_whole));
  int64_t sum = 0;
  auto tokens = [&](int i) { return i < 0 ? 0 : items[i].tokens; };
  for (int i = 0; i < std::min(first + num_whole, open - 1); ++i) sum += items[i].tokens;
  while (first + num_whole + 1 < open && sum - tokens(first) + tokens(first + num_whole) <= cap) {
    sum += tokens(first + num_whole) - tokens(first);
    ++first;
  }
  return {std::max(first, 0), std::min(first + num_whole, open - 1), sum};
}

}  // namespace laer
