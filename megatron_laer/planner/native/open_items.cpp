// Phase 1 of pack_scarce.hpp, and the items' part of 2d. Lists are sorted vectors, as they are read
// far more often than changed.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "open_items.hpp"

#include <algorithm>
#include <iterator>

#include "quotas.hpp"

namespace laer {
namespace {

void insert(std::vector<Item>& list, const Item& item) {
  list.insert(std::lower_bound(list.begin(), list.end(), item), item);
}

void erase(std::vector<Item>& list, const Item& item) {
  list.erase(std::lower_bound(list.begin(), list.end(), item));
}

}  // namespace

OpenItems::OpenItems(const Shape& shape, const int64_t* node_counts_QE)
    : shape_(shape),
      mixed_tokens_QE_(node_counts_QE,
                       node_counts_QE + static_cast<int64_t>(shape.nodes()) * shape.experts),
      shares_E_(shape.experts),
      home_items_Q_(shape.nodes()) {
  const int64_t most_items = static_cast<int64_t>(shape.ranks) * (shape.capacity - 1) + 1;
  if (shape.nodes() > 1) split_ahead(node_counts_QE, most_items - shape.experts);
  const std::vector<int64_t> tokens_E = expert_loads(shape, mixed_tokens_QE_.data());
  for (int e = 0; e < shape.experts; ++e) {
    mixed_items_.push_back({tokens_E[e], e, Item::kMixed});
    tokens_ += tokens_E[e];
  }
  std::sort(mixed_items_.begin(), mixed_items_.end());
  size_ += shape.experts;
}

// Splits go to the largest shares that are not their expert's largest one.
void OpenItems::split_ahead(const int64_t* node_counts_QE, int64_t num_splits) {
  if (num_splits <= 0) return;
  std::vector<int> largest_node_E(shape_.experts, 0);
  std::vector<int64_t> largest_E(node_counts_QE, node_counts_QE + shape_.experts);
  for (int node = 1; node < shape_.nodes(); ++node) {
    const int64_t* counts_E = node_counts_QE + at(node, 0);
    for (int e = 0; e < shape_.experts; ++e) {
      if (counts_E[e] > largest_E[e]) largest_node_E[e] = node;
      largest_E[e] = std::max(largest_E[e], counts_E[e]);
    }
  }
  // Only the largest shares are kept, in a heap with the least of them in front.
  std::vector<Item> shares;
  auto larger = [](const Item& a, const Item& b) { return b < a; };
  for (int node = 0; node < shape_.nodes(); ++node) {
    for (int e = 0; e < shape_.experts; ++e) {
      const Item share{node_counts_QE[at(node, e)], e, node};
      if (node == largest_node_E[e] || share.tokens == 0) continue;
      if (static_cast<int64_t>(shares.size()) == num_splits) {
        if (!(shares.front() < share)) continue;
        std::pop_heap(shares.begin(), shares.end(), larger);
        shares.pop_back();
      }
      shares.push_back(share);
      std::push_heap(shares.begin(), shares.end(), larger);
    }
  }
  for (const Item& share : shares) {
    mixed_tokens_QE_[at(share.home, share.expert)] = 0;
    open(share);
  }
}

void OpenItems::merge(const std::vector<Item>& home_items, std::vector<Item>& items) const {
  if (home_items.empty()) {
    items = mixed_items_;
    return;
  }
  items.resize(home_items.size() + mixed_items_.size());
  std::merge(home_items.begin(), home_items.end(), mixed_items_.begin(), mixed_items_.end(),
             items.begin());
}

void OpenItems::all(std::vector<Item>& items) {
  std::sort(opened_.begin(), opened_.end());
  std::sort(closed_.begin(), closed_.end());
  std::vector<Item> with_opened(all_home_items_.size() + opened_.size());
  std::merge(all_home_items_.begin(), all_home_items_.end(), opened_.begin(), opened_.end(),
             with_opened.begin());
  all_home_items_.clear();
  std::set_difference(with_opened.begin(), with_opened.end(), closed_.begin(), closed_.end(),
                      std::back_inserter(all_home_items_));
  opened_.clear();
  closed_.clear();
  merge(all_home_items_, items);
}

void OpenItems::open(const Item& item) {
  if (item.is_mixed()) {
    insert(mixed_items_, item);
  } else {
    insert(home_items_Q_[item.home], item);
    opened_.push_back(item);
  }
  tokens_ += item.tokens;
  ++size_;
}

void OpenItems::close(const Item& item) {
  if (item.is_mixed()) {
    erase(mixed_items_, item);
  } else {
    erase(home_items_Q_[item.home], item);
    closed_.push_back(item);
  }
  tokens_ -= item.tokens;
  --size_;
}

// The mixed tokens of the node that has most of them. Shares in the heap become less, never more, so
// one that is up to date in front is the largest.
int64_t& OpenItems::most_tokens(int expert) {
  std::vector<Share>& shares = shares_E_[expert];
  const auto less = [](const Share& a, const Share& b) {
    return a.tokens != b.tokens ? a.tokens < b.tokens : a.node > b.node;
  };
  if (shares.empty()) {
    for (int node = 0; node < shape_.nodes(); ++node) {
      shares.push_back({mixed_tokens_QE_[at(node, expert)], node});
    }
    std::make_heap(shares.begin(), shares.end(), less);
  }
  while (true) {
    int64_t& tokens = mixed_tokens_QE_[at(shares.front().node, expert)];
    if (shares.front().tokens == tokens) return tokens;
    std::pop_heap(shares.begin(), shares.end(), less);
    shares.back().tokens = tokens;
    std::push_heap(shares.begin(), shares.end(), less);
  }
}

void OpenItems::take(int node, Item item, int64_t amount) {
  close(item);
  int64_t local = item.home == node ? item.tokens : 0;
  if (item.is_mixed()) local = mixed_tokens_QE_[at(node, item.expert)];
  const int64_t own = std::min(amount, local);
  item.tokens -= amount;
  if (item.tokens == 0) return;
  if (item.is_mixed()) {
    mixed_tokens_QE_[at(node, item.expert)] -= own;
    // Tokens of other nodes come from those with most of them.
    for (int64_t more = amount - own; more > 0;) {
      int64_t& most = most_tokens(item.expert);
      const int64_t part = std::min(more, most);
      most -= part;
      more -= part;
    }
  }
  open(item);
}

}  // namespace laer
