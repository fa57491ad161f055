// The search for what one rank takes of the items that are open to it: the cheapest legal choice
// that it finds. It changes nothing but its own scratch space; pack_scarce.hpp says which choices
// are legal, and window.hpp what items are.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "window.hpp"

namespace laer {

// A choice costs the tokens that it takes off their node, and what these weights add, in percent of
// such a token.
struct PackingWeights {
  // The cost of each token of the split item that is in this node and stays open, where these are
  // so few that another rank of the node is unlikely to come back for them.
  int64_t left_behind_percent;
  // Of the split item the rank should take this part of what it takes whole, so that load can flow
  // off to the expert's other ranks when the rank's whole experts grow. A token missing to that
  // costs as much as one off its node.
  int64_t split_part_percent;
};

// What makes a choice legal for the rank at hand, beside its `cap`.
struct RankBounds {
  int64_t least_tokens;  // fewer, and the other ranks could not carry the rest
  int64_t spare_items;   // so many fewer than C - 1 items may be taken whole
};

// Positions in the list of items that the rank chooses from.
struct RankChoice {
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max() / 4;

  int64_t cost = kNone;
  std::vector<int> whole_items;
  int split_item = -1;
  int64_t split_tokens = 0;
};

class RankChoiceSearch {
 public:
  RankChoiceSearch(int capacity, int64_t cap, const PackingWeights& weights)
      : num_whole_(capacity - 1), cap_(cap), weights_(weights) {}

  // The cheapest choice found, of cost kNone if none is. `items` ascending; `mixed_tokens_E` are
  // the tokens of the rank's node in mixed items. Valid until the next call.
  const RankChoice& cheapest(const std::vector<Item>& items, const int64_t* mixed_tokens_E,
                             const RankBounds& bounds);

 private:
  static constexpr int kMostSplitItems = 8;

  // An item that the rank may fill up with.
  struct SplitItem {
    int index;
    int64_t tokens, local;
    bool is_mixed;
  };

  // Items that are taken whole, by their sums.
  struct Whole {
    int64_t tokens, off_node;
  };

  // The same and item `i` as well.
  Whole with(const Whole& whole, int i) const {
    return {whole.tokens + items_[i].tokens, whole.off_node + off_node_[i]};
  }

  void find_split_items();
  void try_split_item(const SplitItem& split);
  void search_one(const SplitItem& split, int first, const Whole& smallest);
  void search_pairs(const SplitItem& split, int first, const Whole& smallest);

  // What the rank must take of the split item beside the items taken whole.
  int64_t least_amount(const Whole& whole) const {
    return std::max<int64_t>(bounds_.least_tokens - whole.tokens, 0);
  }

  // A choice: of the items taken whole, `one` and `two` were searched for. Nearly all choices end
  // here, as no amount of the split item costs less than what is compared.
  void consider(const SplitItem& split, const Whole& whole, int one, int two) {
    const int64_t least_cost =
        whole.off_node + std::max<int64_t>(least_amount(whole) - split.local, 0);
    if (whole.tokens <= cap_ && least_cost < best_.cost) choose_amount(split, whole, one, two);
  }

  void choose_amount(const SplitItem& split, const Whole& whole, int one, int two);

  const int num_whole_;
  const int64_t cap_;
  const PackingWeights weights_;
  RankBounds bounds_{};
  const Item* items_ = nullptr;
  int size_ = 0;
  std::vector<int64_t> local_, off_node_;  // tokens of each item from this node, and the others
  std::array<int, kMostSplitItems> split_items_{};
  int num_split_items_ = 0;
  std::vector<int> smallest_;  // positions of items taken whole without a search
  int one_ = -1, two_ = -1;    // of the best choice, the positions that were searched for
  RankChoice best_;
};

}  // namespace laer
