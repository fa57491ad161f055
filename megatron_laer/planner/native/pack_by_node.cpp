// Two phases: 1 which experts each node hosts and what it takes of them (node_shares.hpp); 2 the
// ranks of each node by the window argument (window.hpp), for which phase 1 gives a node
// G*(C-1) + 1 experts at most, and G*cap tokens.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "pack_by_node.hpp"

#include <algorithm>
#include <vector>

#include "node_shares.hpp"
#include "window.hpp"

namespace laer {
namespace {

// An item of a node is what it takes of an expert.
std::vector<std::vector<Item>> node_items(const Shape& shape, const NodeShares& shares) {
  std::vector<std::vector<Item>> items_Q(shape.nodes());
  for (int e = 0; e < shape.experts; ++e) {
    int last = -1;
    bool is_placed = false;
    for (int node = 0; node < shape.nodes(); ++node) {
      const size_t at = static_cast<size_t>(node) * shape.experts + e;
      if (!shares.hosted_QE[at]) continue;
      last = node;
      if (shares.tokens_QE[at] == 0) continue;
      items_Q[node].push_back({shares.tokens_QE[at], e, node});
      is_placed = true;
    }
    // An expert without tokens still needs one slot somewhere.
    if (!is_placed) items_Q[last].push_back({0, e, last});
  }
  return items_Q;
}

void fill_ranks(const Shape& shape, int64_t cap, int node, std::vector<Item>& items,
                RankContents& contents) {
  const int num_whole = shape.capacity - 1;
  std::sort(items.begin(), items.end());
  for (int local_rank = 0; local_rank < shape.node_size && !items.empty(); ++local_rank) {
    const int rank = node * shape.node_size + local_rank;
    const Window window = find_window(items, num_whole, shape.node_size - local_rank, cap);
    for (int i = window.first; i <= window.split_item; ++i) contents.add(rank, items[i].expert);
    Item rest = items[window.split_item];
    rest.tokens -= std::min(rest.tokens, cap - window.whole_tokens);
    items.erase(items.begin() + window.first, items.begin() + window.split_item + 1);
    if (rest.tokens > 0) items.insert(std::lower_bound(items.begin(), items.end(), rest), rest);
  }
}

}  // namespace

bool pack_by_node(const Shape& shape, const int64_t* node_counts_QE, int64_t cap,
                  RankContents& contents) {
  // The most experts that a node can balance.
  const int most_experts =
      std::min(shape.experts, shape.node_size * (shape.capacity - 1) + 1);
  // With hardly more places than experts, balance between nodes decides which node hosts what.
  if (most_experts < shape.experts &&
      static_cast<int64_t>(shape.nodes()) * (most_experts - 2) < shape.experts) {
    return false;
  }
  const NodeShares shares = share_among_nodes(shape, node_counts_QE, cap, most_experts, true);
  if (!shares.is_balanced) return false;
  std::vector<std::vector<Item>> items_Q = node_items(shape, shares);
  for (int node = 0; node < shape.nodes(); ++node) {
    fill_ranks(shape, cap, node, items_Q[node], contents);
  }
  return true;
}

}  // namespace laer
