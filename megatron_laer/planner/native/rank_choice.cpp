// Phase 2b of pack_scarce.hpp. Of the C - 1 items that a rank takes whole, all but two are the
// smallest ones, and only the last two are searched for: a heuristic, which keeps the search at
// most quadratic in the number of items.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "rank_choice.hpp"

#include <algorithm>

namespace laer {
namespace {

// With more items, only the two largest shares are tried as split items.
constexpr int kFewItems = 64;

// With more items, not all pairs of them are tried.
constexpr int kFewForPairs = 48;

}  // namespace

const RankChoice& RankChoiceSearch::cheapest(const std::vector<Item>& items,
                                             const int64_t* mixed_tokens_E,
                                             const RankBounds& bounds) {
  best_.cost = RankChoice::kNone;
  bounds_ = bounds;
  items_ = items.data();
  size_ = static_cast<int>(items.size());
  if (size_ + bounds.spare_items < num_whole_ + 1) return best_;
  local_.resize(size_);
  off_node_.resize(size_);
  for (int i = 0; i < size_; ++i) {
    local_[i] = items[i].is_mixed() ? mixed_tokens_E[items[i].expert] : items[i].tokens;
    off_node_[i] = items[i].tokens - local_[i];
  }
  find_split_items();
  for (int i = 0; i < num_split_items_; ++i) {
    const int index = split_items_[i];
    try_split_item({index, items[index].tokens, local_[index], items[index].is_mixed()});
  }
  return best_;
}

// Candidates are the items with most tokens in this node, of equal ones the larger item.
void RankChoiceSearch::find_split_items() {
  const int most = size_ > kFewItems ? 2 : kMostSplitItems;
  num_split_items_ = 0;
  int64_t least = -1;
  for (int i = size_ - 1; i >= 0; --i) {
    const int64_t share = local_[i];
    if (share <= least) continue;
    int at = num_split_items_ < most ? num_split_items_++ : most - 1;
    for (; at > 0 && local_[split_items_[at - 1]] < share; --at) {
      split_items_[at] = split_items_[at - 1];
    }
    split_items_[at] = i;
    if (num_split_items_ == most) least = local_[split_items_[most - 1]];
  }
}

void RankChoiceSearch::try_split_item(const SplitItem& split) {
  const int num_searched = std::min(num_whole_, 2);
  const int64_t cost_before = best_.cost;
  smallest_.clear();
  Whole smallest{0, 0};
  int64_t spare = bounds_.spare_items;
  int first = 0;
  for (int taken = 0; taken < num_whole_ - num_searched; ++taken) {
    if (first == split.index) ++first;
    // Rather none than one that leaves its node.
    if (spare > 0 && (first >= size_ || off_node_[first] > 0)) {
      --spare;
      continue;
    }
    if (first >= size_) return;
    smallest_.push_back(first);
    smallest = with(smallest, first);
    ++first;
  }
  if (num_searched == 0 || spare >= num_searched) consider(split, smallest, -1, -1);
  if (num_searched == 1 || (num_searched == 2 && spare > 0)) search_one(split, first, smallest);
  if (num_searched == 2) search_pairs(split, first, smallest);
  if (best_.cost < cost_before) {
    best_.whole_items = smallest_;
    if (one_ >= 0) best_.whole_items.push_back(one_);
    if (two_ >= 0) best_.whole_items.push_back(two_);
  }
}

// One more item, from position `first` on.
void RankChoiceSearch::search_one(const SplitItem& split, int first, const Whole& smallest) {
  // A smaller item would leave more to fill than the split item has.
  const int64_t enough = bounds_.least_tokens - smallest.tokens - split.tokens;
  const Item* start =
      std::lower_bound(items_ + first, items_ + size_, enough,
                       [](const Item& item, int64_t tokens) { return item.tokens < tokens; });
  for (int i = static_cast<int>(start - items_); i < size_; ++i) {
    if (smallest.tokens + items_[i].tokens > cap_) break;
    if (i == split.index) continue;
    consider(split, with(smallest, i), i, -1);
  }
}

// Two more items, from position `first` on.
void RankChoiceSearch::search_pairs(const SplitItem& split, int first, const Whole& smallest) {
  if (size_ <= kFewForPairs) {
    for (int i = first; i < size_; ++i) {
      const Whole with_one = with(smallest, i);
      if (i == split.index || with_one.off_node >= best_.cost) continue;
      for (int j = i + 1; j < size_; ++j) {
        if (j == split.index) continue;
        const Whole both = with(with_one, j);
        if (both.tokens > cap_) break;
        consider(split, both, i, j);
      }
    }
    return;
  }
  // Two pointers towards the sum that leaves the split item just its tokens in this node.
  const int64_t wanted = cap_ - std::min(cap_, split.local);
  int i = first, j = size_ - 1;
  while (i < j) {
    if (i == split.index) {
      ++i;
      continue;
    }
    if (j == split.index) {
      --j;
      continue;
    }
    const Whole both = with(with(smallest, i), j);
    consider(split, both, i, j);
    if (both.tokens < wanted) {
      ++i;
    } else {
      --j;
    }
  }
}

// The best number of the split item's tokens beside the items taken whole.
void RankChoiceSearch::choose_amount(const SplitItem& split, const Whole& whole, int one, int two) {
  const int64_t low = least_amount(whole);
  const int64_t high = std::min(split.tokens, cap_ - whole.tokens);
  if (low > high) return;
  const int64_t amount = std::min(std::max(split.local, low), high);
  int64_t cost = whole.off_node + std::max<int64_t>(amount - split.local, 0);
  const int64_t left_behind = split.local - amount;
  if (left_behind > 0 && split.is_mixed && left_behind * 2 < cap_) {
    cost += left_behind * weights_.left_behind_percent / 100;
  }
  cost += std::max<int64_t>(whole.tokens * weights_.split_part_percent / 100 - amount, 0);
  if (cost >= best_.cost) return;
  best_.cost = cost;
  best_.split_item = split.index;
  best_.split_tokens = amount;
  one_ = one;
  two_ = two;
}

}  // namespace laer
