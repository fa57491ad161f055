#include "construct.hpp"

#include <algorithm>
#include <numeric>

#include "flow.hpp"
#include "hosts.hpp"
#include "peel.hpp"
#include "proportional.hpp"

namespace laer {
namespace {

// Chosen on the real trace and on the named workloads; neighbouring values do nearly as well.
constexpr Taste kLocal{50, 0}, kSteady{0, 25};

struct Item {
  int64_t rest;
  int expert;

  bool operator<(const Item& other) const {
    return rest != other.rest ? rest < other.rest : expert < other.expert;
  }
};

// The plain construction inside one node: items are experts with their tokens there.
void fill_node(const Shape& shape, int node, int64_t cap, std::vector<Item>& items, Hosts& hosts) {
  const int whole = shape.capacity - 1;
  std::sort(items.begin(), items.end());
  for (int local = 0; local < shape.node_size && !items.empty(); ++local) {
    const int rank = node * shape.node_size + local;
    const Window window = find_window(items, whole, shape.node_size - local, cap);
    for (int i = window.first; i <= window.filling; ++i) hosts.add(rank, items[i].expert);
    Item rest = items[window.filling];
    rest.rest -= std::min(rest.rest, cap - window.sum);
    items.erase(items.begin() + window.first, items.begin() + window.filling + 1);
    if (rest.rest > 0) items.insert(std::lower_bound(items.begin(), items.end(), rest), rest);
  }
}

// Two levels: which experts each node hosts and how many of their tokens, then the plain
// construction in every node. Every node hosts its largest experts, as many as it can balance.
// Returns the tokens that leave their node, or -1 if the nodes cannot be balanced that way.
int64_t construct_by_nodes(const Shape& shape, const int64_t* node_counts_QE, int64_t cap,
                           Hosts& hosts) {
  const int nodes = shape.nodes(), experts = shape.experts;
  const int most = std::min(experts, shape.node_size * (shape.capacity - 1) + 1);
  // With hardly more homes than experts, balance between nodes decides who lives where.
  if (static_cast<int64_t>(nodes) * (most - 2) < experts && most < experts) return -1;
  auto count = [&](int node, int e) {
    return node_counts_QE[static_cast<int64_t>(node) * experts + e];
  };

  std::vector<char> hosted(static_cast<size_t>(nodes) * experts, most == experts);
  if (most < experts) {
    // Every expert needs a home first: the node that has most of its tokens and room.
    std::vector<int> used(nodes, 0), order(experts);
    std::vector<int64_t> total(experts, 0);
    for (int node = 0; node < nodes; ++node) {
      for (int e = 0; e < experts; ++e) total[e] += count(node, e);
    }
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](int a, int b) { return total[a] != total[b] ? total[a] > total[b] : a < b; });
    for (int e : order) {
      int home = -1;
      for (int node = 0; node < nodes; ++node) {
        if (used[node] == most) continue;
        if (home < 0 || count(node, e) > count(home, e) ||
            (count(node, e) == count(home, e) && used[node] < used[home])) {
          home = node;
        }
      }
      hosted[static_cast<size_t>(home) * experts + e] = 1;
      ++used[home];
    }
    for (int node = 0; node < nodes; ++node) {
      char* hosted_E = hosted.data() + static_cast<size_t>(node) * experts;
      const int room = most - used[node];
      order.clear();
      for (int e = 0; e < experts; ++e) {
        if (!hosted_E[e] && count(node, e) > 0) order.push_back(e);
      }
      auto larger = [&](int a, int b) {
        return count(node, a) != count(node, b) ? count(node, a) > count(node, b) : a < b;
      };
      if (static_cast<int>(order.size()) > room) {
        std::nth_element(order.begin(), order.begin() + room, order.end(), larger);
        order.resize(room);
      }
      for (int e : order) hosted_E[e] = 1;
      order.resize(experts);
    }
  }

  FlowGraph graph;
  graph.ranks = nodes;
  std::vector<int64_t> flow;
  std::vector<int64_t> room(nodes, cap * shape.node_size);
  int64_t foreign = 0;
  for (int e = 0; e < experts; ++e) {
    int64_t supply = 0;
    graph.group_begin.push_back(graph.groups());
    for (int node = 0; node < nodes; ++node) {
      supply += count(node, e);
      if (!hosted[static_cast<size_t>(node) * experts + e]) continue;
      graph.pair_begin.push_back(graph.pairs());
      graph.pair_rank.push_back(node);
      graph.own.push_back(count(node, e));
      flow.push_back(std::min(count(node, e), room[node]));
      room[node] -= flow.back();
      foreign -= flow.back();
    }
    graph.supply.push_back(supply);
    foreign += supply;
  }
  graph.group_begin.push_back(graph.groups());
  graph.pair_begin.push_back(graph.pairs());
  if (foreign > 0) {
    graph.index();
    if (minimise_largest_load(graph, cap * shape.node_size, flow) > cap * shape.node_size) {
      return -1;
    }
    minimise_foreign(graph, cap * shape.node_size, flow);
    foreign = 0;
    for (int pair = 0; pair < graph.pairs(); ++pair) {
      foreign += std::max<int64_t>(flow[pair] - graph.own[pair], 0);
    }
  }

  std::vector<std::vector<Item>> items(nodes);
  for (int e = 0; e < experts; ++e) {
    bool placed = false;
    for (int pair = graph.group_begin[e]; pair < graph.group_begin[e + 1]; ++pair) {
      // An expert without tokens still needs one slot somewhere.
      const bool last = pair + 1 == graph.group_begin[e + 1];
      if (flow[pair] == 0 && !(last && !placed)) continue;
      items[graph.pair_rank[pair]].push_back({flow[pair], e});
      placed = true;
    }
  }
  for (int node = 0; node < nodes; ++node) fill_node(shape, node, cap, items[node], hosts);
  return foreign;
}

}  // namespace

bool can_balance(const Shape& shape) {
  return shape.experts <= static_cast<int64_t>(shape.ranks) * (shape.capacity - 1) + 1;
}

std::vector<int16_t> construct(const Shape& shape, const int64_t* node_counts_QE,
                               Purpose purpose) {
  int64_t total = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(shape.nodes()) * shape.experts; ++i) {
    total += node_counts_QE[i];
  }
  const int64_t cap = (total + shape.ranks - 1) / shape.ranks;
  // A spare split for every rank lets nodes balance themselves; with fewer, both ways are tried.
  const bool scarce = static_cast<int64_t>(shape.ranks) * (shape.capacity - 2) < shape.experts;
  Hosts by_nodes(shape);
  const int64_t foreign = construct_by_nodes(shape, node_counts_QE, cap, by_nodes);
  if (foreign == 0 || (foreign > 0 && !scarce)) return by_nodes.finish(node_counts_QE);
  Hosts peeled(shape);
  const Taste& taste = purpose == Purpose::kNow ? kLocal : kSteady;
  const int64_t peeled_foreign = peel(shape, node_counts_QE, cap, taste, peeled);
  const bool take_nodes = foreign > 0 && foreign <= peeled_foreign;
  return (take_nodes ? by_nodes : peeled).finish(node_counts_QE);
}

std::vector<int16_t> fresh(const Shape& shape, const int64_t* node_counts_QE) {
  return can_balance(shape) ? construct(shape, node_counts_QE, Purpose::kNow)
                            : proportional(shape, node_counts_QE, Purpose::kNow);
}

}  // namespace laer
