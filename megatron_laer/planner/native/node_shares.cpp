// Two phases: 1 which experts each node hosts; 2 how many tokens of each expert each node takes, a
// flow (flow.hpp).
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "node_shares.hpp"

#include <algorithm>
#include <numeric>

#include "flow.hpp"
#include "quotas.hpp"

namespace laer {
namespace {

class Sharing {
 public:
  Sharing(const Shape& shape, const int64_t* node_counts_QE, int64_t cap, int most_experts,
          bool needs_balance)
      : shape_(shape),
        nodes_(shape.nodes()),
        experts_(shape.experts),
        most_experts_(std::min(shape.experts, most_experts)),
        counts_QE_(node_counts_QE),
        cap_(cap),
        needs_balance_(needs_balance) {}

  NodeShares run() {
    choose_experts();
    share_tokens();
    NodeShares shares{std::move(hosted_QE_), {}, largest_ <= cap_ * shape_.node_size};
    shares.tokens_QE.assign(shares.hosted_QE.size(), 0);
    for (int e = 0; e < experts_; ++e) {
      for (int pair = graph_.group_begin[e]; pair < graph_.group_begin[e + 1]; ++pair) {
        shares.tokens_QE[static_cast<size_t>(graph_.pair_rank[pair]) * experts_ + e] = flow_[pair];
      }
    }
    return shares;
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
    const std::vector<int64_t> total_E = expert_loads(shape_, counts_QE_);
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

  // Phase 2. In the graph, nodes stand for ranks, and each pair is a group of its own.
  void share_tokens() {
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
    graph_.index();
    if (off_node == 0) return;
    largest_ = minimise_largest_load(graph_, node_cap, flow_);
    if (largest_ > node_cap && needs_balance_) return;
    minimise_foreign(graph_, std::vector<int64_t>(nodes_, std::max(largest_, node_cap)), flow_);
  }

  const Shape& shape_;
  const int nodes_, experts_, most_experts_;
  const int64_t* counts_QE_;
  const int64_t cap_;
  const bool needs_balance_;
  std::vector<char> hosted_QE_;
  std::vector<int> scratch_;
  FlowGraph graph_;
  std::vector<int64_t> flow_;  // by pair
  int64_t largest_ = 0;        // tokens of a node, where they had to be levelled
};

}  // namespace

NodeShares share_among_nodes(const Shape& shape, const int64_t* node_counts_QE, int64_t cap,
                             int most_experts, bool needs_balance) {
  return Sharing(shape, node_counts_QE, cap, most_experts, needs_balance).run();
}

}  // namespace laer
