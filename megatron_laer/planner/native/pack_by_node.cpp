// Three phases: 1 which experts each node hosts; 2 how many tokens of each expert each node takes,
// a flow (flow.hpp); 3 the ranks of each node by the window argument (window.hpp), for which phase
// 1 gives a node G*(C-1) + 1 experts at most, and phase 2 G*cap tokens.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "pack_by_node.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "flow.hpp"
#include "window.hpp"

namespace laer {
namespace {

class NodePacking {
 public:
  NodePacking(const Shape& shape, const int64_t* node_counts_QE, int64_t cap)
      : shape_(shape),
        nodes_(shape.nodes()),
        experts_(shape.experts),
        most_experts_(std::min(shape.experts, shape.node_size * (shape.capacity - 1) + 1)),
        counts_QE_(node_counts_QE),
        cap_(cap) {}

  std::optional<int64_t> run(RankContents& contents) {
    // With hardly more places than experts, balance between nodes decides which node hosts what.
    if (most_experts_ < experts_ && static_cast<int64_t>(nodes_) * (most_experts_ - 2) < experts_) {
      return std::nullopt;
    }
    choose_experts();
    const std::optional<int64_t> off_node = share_tokens();
    if (!off_node) return std::nullopt;
    std::vector<std::vector<Item>> items_Q = node_items();
    for (int node = 0; node < nodes_; ++node) fill_ranks(node, items_Q[node], contents);
    return off_node;
  }

 private:
  int64_t count(int node, int expert) const {
    return counts_QE_[static_cast<int64_t>(node) * experts_ + expert];
  }

  char* hosted_E(int node) { return hosted_QE_.data() + static_cast<size_t>(node) * experts_; }

  // Phase 1.
  void choose_experts() {
    hosted_QE_.assign(static_cast<size_t>(nodes_) * experts_, most_experts_ == experts_);
    if (most_experts_ == experts_) return;
    std::vector<int> used_Q(nodes_, 0);
    choose_one_node_each(used_Q);
    for (int node = 0; node < nodes_; ++node) add_largest(node, most_experts_ - used_Q[node]);
  }

  // Every expert needs a node first, the largest ones choose before the others: the node that has
  // most of its tokens and room.
  void choose_one_node_each(std::vector<int>& used_Q) {
    std::vector<int64_t> total_E(experts_, 0);
    for (int node = 0; node < nodes_; ++node) {
      for (int e = 0; e < experts_; ++e) total_E[e] += count(node, e);
    }
    std::vector<int> order(experts_);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int a, int b) {
      return total_E[a] != total_E[b] ? total_E[a] > total_E[b] : a < b;
    });
    for (int e : order) {
      int best = -1;
      for (int node = 0; node < nodes_; ++node) {
        if (used_Q[node] == most_experts_) continue;
        if (best < 0 || count(node, e) > count(best, e) ||
            (count(node, e) == count(best, e) && used_Q[node] < used_Q[best])) {
          best = node;
        }
      }
      hosted_E(best)[e] = 1;
      ++used_Q[best];
    }
  }

  // Places left in a node go to the experts with most tokens there.
  void add_largest(int node, int room) {
    std::vector<int>& others = scratch_;
    others.clear();
    for (int e = 0; e < experts_; ++e) {
      if (!hosted_E(node)[e] && count(node, e) > 0) others.push_back(e);
    }
    auto larger = [&](int a, int b) {
      return count(node, a) != count(node, b) ? count(node, a) > count(node, b) : a < b;
    };
    if (static_cast<int>(others.size()) > room) {
      std::nth_element(others.begin(), others.begin() + room, others.end(), larger);
      others.resize(room);
    }
    for (int e : others) hosted_E(node)[e] = 1;
  }

  // Phase 2. Returns the tokens that leave their node, or nothing if a node must take more than its
  // ranks can carry. In the graph, nodes stand for ranks, and each pair is a group of its own.
  std::optional<int64_t> share_tokens() {
    const int64_t node_cap = cap_ * shape_.node_size;
    std::vector<int64_t> room_Q(nodes_, node_cap);
    int64_t off_node = 0;
    graph_.ranks = nodes_;
    for (int e = 0; e < experts_; ++e) {
      int64_t supply = 0;
      graph_.group_begin.push_back(graph_.groups());
      for (int node = 0; node < nodes_; ++node) {
        supply += count(node, e);
        if (!hosted_E(node)[e]) continue;
        graph_.pair_begin.push_back(graph_.pairs());
        graph_.pair_rank.push_back(node);
        graph_.own.push_back(count(node, e));
        flow_.push_back(std::min(count(node, e), room_Q[node]));
        room_Q[node] -= flow_.back();
        off_node -= flow_.back();
      }
      graph_.supply.push_back(supply);
      off_node += supply;
    }
    graph_.group_begin.push_back(graph_.groups());
    graph_.pair_begin.push_back(graph_.pairs());
    if (off_node == 0) return 0;
    graph_.index();
    if (minimise_largest_load(graph_, node_cap, flow_) > node_cap) return std::nullopt;
    minimise_foreign(graph_, node_cap, flow_);
    off_node = 0;
    for (int pair = 0; pair < graph_.pairs(); ++pair) {
      off_node += std::max<int64_t>(flow_[pair] - graph_.own[pair], 0);
    }
    return off_node;
  }

  // Phase 3. An item of a node is what it takes of an expert.
  std::vector<std::vector<Item>> node_items() const {
    std::vector<std::vector<Item>> items_Q(nodes_);
    for (int e = 0; e < experts_; ++e) {
      bool is_placed = false;
      for (int pair = graph_.group_begin[e]; pair < graph_.group_begin[e + 1]; ++pair) {
        // An expert without tokens still needs one slot somewhere.
        const bool is_last = pair + 1 == graph_.group_begin[e + 1];
        if (flow_[pair] == 0 && !(is_last && !is_placed)) continue;
        const int node = graph_.pair_rank[pair];
        items_Q[node].push_back({flow_[pair], e, node});
        is_placed = true;
      }
    }
    return items_Q;
  }

  void fill_ranks(int node, std::vector<Item>& items, RankContents& contents) const {
    const int num_whole = shape_.capacity - 1;
    std::sort(items.begin(), items.end());
    for (int local_rank = 0; local_rank < shape_.node_size && !items.empty(); ++local_rank) {
      const int rank = node * shape_.node_size + local_rank;
      const Window window = find_window(items, num_whole, shape_.node_size - local_rank, cap_);
      for (int i = window.first; i <= window.split_item; ++i) contents.add(rank, items[i].expert);
      Item rest = items[window.split_item];
      rest.tokens -= std::min(rest.tokens, cap_ - window.whole_tokens);
      items.erase(items.begin() + window.first, items.begin() + window.split_item + 1);
      if (rest.tokens > 0) items.insert(std::lower_bound(items.begin(), items.end(), rest), rest);
    }
  }

  const Shape& shape_;
  const int nodes_, experts_, most_experts_;  // most experts that a node can balance
  const int64_t* counts_QE_;
  const int64_t cap_;
  std::vector<char> hosted_QE_;
  std::vector<int> scratch_;
  FlowGraph graph_;
  std::vector<int64_t> flow_;  // by pair
};

}  // namespace

std::optional<int64_t> pack_by_node(const Shape& shape, const int64_t* node_counts_QE, int64_t cap,
                                    RankContents& contents) {
  return NodePacking(shape, node_counts_QE, cap).run(contents);
}

}  // namespace laer
