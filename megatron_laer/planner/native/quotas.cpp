#include "quotas.hpp"

#include <algorithm>

#include "flow.hpp"

namespace laer {
namespace {

struct Interval {
  int64_t begin, end;

  int64_t size() const { return std::max<int64_t>(end - begin, 0); }
  Interval within(int64_t low, int64_t high) const {
    return {std::max(begin, low), std::min(end, high)};
  }
};

int64_t overlap(const Interval& a, const Interval& b) {
  return std::max<int64_t>(std::min(a.end, b.end) - std::max(a.begin, b.begin), 0);
}

// Replicas by expert, [E + 1] and [S], by rank; a second slot of an expert on a rank is left out.
struct Replicas {
  std::vector<int> begin_E, slot;

  Replicas(const Shape& shape, const int16_t* slots_S) {
    const int slots = shape.slots();
    std::vector<int> last_rank_E(shape.experts, -1);
    std::vector<char> first_S(slots);
    begin_E.assign(shape.experts + 1, 0);
    for (int s = 0; s < slots; ++s) {
      const int expert = slots_S[s], rank = s / shape.capacity;
      first_S[s] = last_rank_E[expert] != rank;
      last_rank_E[expert] = rank;
      begin_E[expert + 1] += first_S[s];
    }
    for (int e = 0; e < shape.experts; ++e) begin_E[e + 1] += begin_E[e];
    slot.resize(begin_E[shape.experts]);
    std::vector<int> place(begin_E.begin(), begin_E.end() - 1);
    for (int s = 0; s < slots; ++s) {
      if (first_S[s]) slot[place[slots_S[s]]++] = s;
    }
  }
};

// The order in which sources of a node are served inside it: it turns with the expert, so that
// what is left for other nodes does not always come from the same rank.
int turned(const Shape& shape, int expert, int position) {
  return (expert + position) % shape.node_size;
}

// One expert's tokens as intervals. Own tokens first; what is left of sources and replicas in a
// node are two rows of intervals that are matched where they overlap; what lies beyond is matched
// the same way over all nodes.
class ExpertSplit {
 public:
  ExpertSplit(const Shape& shape, const int64_t* counts_NE, const int64_t* node_counts_QE,
              const int64_t* loads_S, const Replicas& replicas, int expert)
      : shape_(shape),
        counts_NE_(counts_NE),
        node_counts_QE_(node_counts_QE),
        loads_S_(loads_S),
        slot_(replicas.slot.data()),
        begin_(replicas.begin_E[expert]),
        end_(replicas.begin_E[expert + 1]),
        expert_(expert) {}

  int begin() const { return begin_; }
  int end() const { return end_; }
  int slot(int replica) const { return slot_[replica]; }
  int rank(int replica) const { return slot_[replica] / shape_.capacity; }
  int64_t load(int replica) const { return loads_S_[slot_[replica]]; }
  int64_t count(int rank) const {
    return counts_NE_[static_cast<int64_t>(rank) * shape_.experts + expert_];
  }
  int64_t own(int replica) const { return std::min(count(rank(replica)), load(replica)); }
  int64_t node_supply(int node) const {
    return node_counts_QE_[static_cast<int64_t>(node) * shape_.experts + expert_];
  }

  // Calls visit(node, first replica, end replica) for every node, in order.
  template <typename Visit>
  void for_nodes(Visit visit) const {
    int replica = begin_;
    for (int node = 0; node < shape_.nodes(); ++node) {
      const int first = replica;
      while (replica < end_ && rank(replica) / shape_.node_size == node) ++replica;
      visit(node, first, replica);
    }
  }

  struct Node {
    int64_t near;        // tokens matched inside the node, own ones not counted
    int64_t far_supply;  // tokens that must leave
    int64_t far_demand;  // tokens that must come
  };

  Node node(int node, int first, int last) const {
    int64_t own_tokens = 0, load_tokens = 0;
    for (int replica = first; replica < last; ++replica) {
      own_tokens += own(replica);
      load_tokens += load(replica);
    }
    const int64_t supply = node_supply(node);
    return {std::min(supply, load_tokens) - own_tokens,
            std::max<int64_t>(supply - load_tokens, 0),
            std::max<int64_t>(load_tokens - supply, 0)};
  }

  // Calls visit(rank, interval in the node's row) for the node's sources, own tokens taken off.
  template <typename Visit>
  void for_sources(int node, int first, int last, Visit visit) const {
    int64_t at = 0;
    for (int position = 0; position < shape_.node_size; ++position) {
      const int source = node * shape_.node_size + turned(shape_, expert_, position);
      int64_t left = count(source);
      if (left == 0) continue;
      for (int replica = first; replica < last; ++replica) {
        if (rank(replica) == source) left -= own(replica);
      }
      visit(source, Interval{at, at + left});
      at += left;
    }
  }

  template <typename Visit>
  void for_targets(int first, int last, Visit visit) const {
    int64_t at = 0;
    for (int replica = first; replica < last; ++replica) {
      const int64_t left = load(replica) - own(replica);
      visit(replica, Interval{at, at + left});
      at += left;
    }
  }

 private:
  const Shape& shape_;
  const int64_t* counts_NE_;
  const int64_t* node_counts_QE_;
  const int64_t* loads_S_;
  const int* slot_;
  int begin_, end_, expert_;
};

Interval beyond(const Interval& interval, int64_t near, int64_t far_begin) {
  const Interval part = interval.within(near, interval.end);
  return {far_begin + part.begin - near, far_begin + part.begin - near + part.size()};
}

// Pairs of one expert are neighbours, in rank order; each of its nodes is a group.
FlowGraph node_graph(const Shape& shape, const int64_t* node_counts_QE, const Replicas& replicas) {
  FlowGraph graph;
  graph.ranks = shape.ranks;
  graph.supply.assign(shape.experts, 0);
  for (int node = 0; node < shape.nodes(); ++node) {
    const int64_t* counts_E = node_counts_QE + static_cast<int64_t>(node) * shape.experts;
    for (int e = 0; e < shape.experts; ++e) graph.supply[e] += counts_E[e];
  }
  graph.pair_rank.resize(replicas.slot.size());
  graph.own.reserve(replicas.slot.size());
  for (int e = 0; e < shape.experts; ++e) {
    graph.group_begin.push_back(graph.groups());
    int last_node = -1;
    for (int i = replicas.begin_E[e]; i < replicas.begin_E[e + 1]; ++i) {
      const int rank = replicas.slot[i] / shape.capacity, node = rank / shape.node_size;
      graph.pair_rank[i] = rank;
      if (node == last_node) continue;
      last_node = node;
      graph.pair_begin.push_back(i);
      graph.own.push_back(node_counts_QE[static_cast<int64_t>(node) * shape.experts + e]);
    }
  }
  graph.group_begin.push_back(graph.groups());
  graph.pair_begin.push_back(graph.pairs());
  graph.index();
  return graph;
}

// Every node's share of an expert becomes a supplier of its own, and every pair a group.
FlowGraph rank_graph(const Shape& shape, const int64_t* counts_NE, const int16_t* slots_S,
                     const Replicas& replicas, const FlowGraph& nodes,
                     const std::vector<int64_t>& flow) {
  FlowGraph graph;
  graph.ranks = shape.ranks;
  graph.pair_rank = nodes.pair_rank;
  graph.group_begin = nodes.pair_begin;
  graph.supply.assign(nodes.groups(), 0);
  graph.own.resize(nodes.pairs());
  graph.pair_begin.resize(nodes.pairs() + 1);
  for (int pair = 0; pair < nodes.pairs(); ++pair) {
    const int expert = slots_S[replicas.slot[pair]];
    graph.supply[nodes.pair_group[pair]] += flow[pair];
    graph.own[pair] =
        counts_NE[static_cast<int64_t>(nodes.pair_rank[pair]) * shape.experts + expert];
    graph.pair_begin[pair + 1] = pair + 1;
  }
  graph.index();
  return graph;
}

// A start that is local as far as ranks have room: own rank, own node, anywhere. Experts with few
// replicas first, as they have the least choice.
void fill_locally(const Shape& shape, const int64_t* counts_NE, const FlowGraph& graph, int64_t cap,
                  std::vector<int64_t>& flow) {
  std::vector<int64_t> room_N(shape.ranks, cap);
  std::vector<int> order(graph.suppliers());
  for (int e = 0; e < graph.suppliers(); ++e) order[e] = e;
  auto first_pair = [&](int e) { return graph.pair_begin[graph.group_begin[e]]; };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return first_pair(a + 1) - first_pair(a) < first_pair(b + 1) - first_pair(b);
  });
  auto add = [&](int pair, int64_t wanted) {
    const int64_t amount = std::min(wanted, room_N[graph.pair_rank[pair]]);
    flow[pair] += amount;
    room_N[graph.pair_rank[pair]] -= amount;
    return amount;
  };
  for (int e : order) {
    int64_t left = graph.supply[e];
    for (int group = graph.group_begin[e]; group < graph.group_begin[e + 1]; ++group) {
      int64_t near = graph.own[group];
      for (int pair = graph.pair_begin[group]; pair < graph.pair_begin[group + 1]; ++pair) {
        const int64_t rank = graph.pair_rank[pair];
        const int64_t own = add(pair, std::min(near, counts_NE[rank * shape.experts + e]));
        near -= own;
        left -= own;
      }
      for (int pair = graph.pair_begin[group]; near > 0 && pair < graph.pair_begin[group + 1];
           ++pair) {
        const int64_t more = add(pair, near);
        near -= more;
        left -= more;
      }
    }
    for (int pair = first_pair(e); left > 0 && pair < first_pair(e + 1); ++pair) {
      left -= add(pair, left);
    }
  }
}

int64_t lower_bound(const Shape& shape, const FlowGraph& graph) {
  int64_t total = 0, bound = 0;
  for (int e = 0; e < graph.suppliers(); ++e) {
    const int64_t pairs =
        graph.pair_begin[graph.group_begin[e + 1]] - graph.pair_begin[graph.group_begin[e]];
    total += graph.supply[e];
    bound = std::max(bound, (graph.supply[e] + pairs - 1) / pairs);
  }
  return std::max(bound, (total + shape.ranks - 1) / shape.ranks);
}

}  // namespace

void node_counts(const Shape& shape, const int64_t* counts_NE, int64_t* node_counts_QE) {
  const int64_t size = static_cast<int64_t>(shape.nodes()) * shape.experts;
  std::fill(node_counts_QE, node_counts_QE + size, 0);
  for (int rank = 0; rank < shape.ranks; ++rank) {
    const int64_t* from = counts_NE + static_cast<int64_t>(rank) * shape.experts;
    int64_t* to = node_counts_QE + static_cast<int64_t>(rank / shape.node_size) * shape.experts;
    for (int e = 0; e < shape.experts; ++e) to[e] += from[e];
  }
}

void slot_loads(const Shape& shape, const int64_t* counts_NE, const int64_t* node_counts_QE,
                const int16_t* slots_S, int64_t* loads_S) {
  const Replicas replicas(shape, slots_S);
  const FlowGraph by_node = node_graph(shape, node_counts_QE, replicas);
  std::vector<int64_t> flow(by_node.pairs(), 0);
  int64_t cap = lower_bound(shape, by_node);
  fill_locally(shape, counts_NE, by_node, cap, flow);
  cap = minimise_largest_load(by_node, cap, flow);
  if (shape.nodes() > 1) minimise_foreign(by_node, cap, flow);
  if (shape.node_size > 1) {
    minimise_foreign(rank_graph(shape, counts_NE, slots_S, replicas, by_node, flow), cap, flow);
  }
  std::fill(loads_S, loads_S + shape.slots(), 0);
  for (size_t pair = 0; pair < flow.size(); ++pair) loads_S[replicas.slot[pair]] = flow[pair];
}

void rank_row(const Shape& shape, const int64_t* counts_NE, const int64_t* node_counts_QE,
              const int16_t* slots_S, const int64_t* loads_S, int rank, int64_t* row_S) {
  const Replicas replicas(shape, slots_S);
  std::fill(row_S, row_S + shape.slots(), 0);
  const int home = rank / shape.node_size;
  for (int e = 0; e < shape.experts; ++e) {
    const ExpertSplit split(shape, counts_NE, node_counts_QE, loads_S, replicas, e);
    if (split.count(rank) == 0) continue;
    Interval far{0, 0};
    int64_t far_begin = 0;
    split.for_nodes([&](int node, int first, int last) {
      const auto sums = split.node(node, first, last);
      if (node == home) {
        Interval mine{0, 0};
        split.for_sources(node, first, last, [&](int source, const Interval& interval) {
          if (source == rank) mine = interval;
        });
        const Interval near = mine.within(0, sums.near);
        split.for_targets(first, last, [&](int replica, const Interval& interval) {
          row_S[split.slot(replica)] = overlap(near, interval);
          if (split.rank(replica) == rank) row_S[split.slot(replica)] += split.own(replica);
        });
        far = beyond(mine, sums.near, far_begin);
      }
      far_begin += sums.far_supply;
    });
    if (far.size() == 0) continue;
    int64_t demand_begin = 0;
    split.for_nodes([&](int node, int first, int last) {
      const auto sums = split.node(node, first, last);
      if (sums.far_demand == 0) return;
      split.for_targets(first, last, [&](int replica, const Interval& interval) {
        row_S[split.slot(replica)] += overlap(far, beyond(interval, sums.near, demand_begin));
      });
      demand_begin += sums.far_demand;
    });
  }
}

void rank_columns(const Shape& shape, const int64_t* counts_NE, const int64_t* node_counts_QE,
                  const int16_t* slots_S, const int64_t* loads_S, int rank, int64_t* columns_NC) {
  const Replicas replicas(shape, slots_S);
  std::fill(columns_NC, columns_NC + shape.slots(), 0);
  const int home = rank / shape.node_size;
  for (int c = 0; c < shape.capacity; ++c) {
    const int slot = rank * shape.capacity + c;
    if (loads_S[slot] == 0) continue;
    auto column = [&](int source) -> int64_t& { return columns_NC[source * shape.capacity + c]; };
    const ExpertSplit split(shape, counts_NE, node_counts_QE, loads_S, replicas, slots_S[slot]);
    Interval far{0, 0};
    int64_t demand_begin = 0;
    split.for_nodes([&](int node, int first, int last) {
      const auto sums = split.node(node, first, last);
      if (node == home) {
        Interval mine{0, 0};
        split.for_targets(first, last, [&](int replica, const Interval& interval) {
          if (split.slot(replica) != slot) return;
          mine = interval;
          column(rank) = split.own(replica);
        });
        const Interval near = mine.within(0, sums.near);
        split.for_sources(node, first, last, [&](int source, const Interval& interval) {
          column(source) += overlap(near, interval);
        });
        far = beyond(mine, sums.near, demand_begin);
      }
      demand_begin += sums.far_demand;
    });
    if (far.size() == 0) continue;
    int64_t far_begin = 0;
    split.for_nodes([&](int node, int first, int last) {
      const auto sums = split.node(node, first, last);
      const Interval row{far_begin, far_begin + sums.far_supply};
      far_begin = row.end;
      if (overlap(row, far) == 0) return;
      split.for_sources(node, first, last, [&](int source, const Interval& interval) {
        column(source) += overlap(far, beyond(interval, sums.near, row.begin));
      });
    });
  }
}

Totals totals(const Shape& shape, const int64_t* counts_NE, const int64_t* node_counts_QE,
              const int16_t* slots_S, const int64_t* loads_S) {
  const Replicas replicas(shape, slots_S);
  Totals sums;
  sums.near_S.assign(shape.slots(), 0);
  sums.far_S.assign(shape.slots(), 0);
  sums.sent_near_N.assign(shape.ranks, 0);
  sums.sent_far_N.assign(shape.ranks, 0);
  sums.own_N.assign(shape.ranks, 0);
  for (int e = 0; e < shape.experts; ++e) {
    const ExpertSplit split(shape, counts_NE, node_counts_QE, loads_S, replicas, e);
    split.for_nodes([&](int node, int first, int last) {
      const auto in_node = split.node(node, first, last);
      for (int replica = first; replica < last; ++replica) {
        sums.own_N[split.rank(replica)] += split.own(replica);
        sums.sent_near_N[split.rank(replica)] += split.own(replica);
        sums.near_S[split.slot(replica)] += split.own(replica);
      }
      split.for_targets(first, last, [&](int replica, const Interval& interval) {
        const int64_t near = interval.within(0, in_node.near).size();
        sums.near_S[split.slot(replica)] += near;
        sums.far_S[split.slot(replica)] += interval.size() - near;
      });
      split.for_sources(node, first, last, [&](int source, const Interval& interval) {
        const int64_t near = interval.within(0, in_node.near).size();
        sums.sent_near_N[source] += near;
        sums.sent_far_N[source] += interval.size() - near;
      });
    });
  }
  return sums;
}

}  // namespace laer
