// The first half of the exact quotas: how many tokens each slot computes, by two flow problems over
// nodes and one over ranks (flow.hpp). Which tokens these are is decided in token_split.cpp.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "flow.hpp"
#include "quotas.hpp"
#include "replicas.hpp"

namespace laer {

namespace {

// Pairs of one expert are neighbours, in rank order; each of its nodes is a group. Slots of experts
// with no other have their loads, and no pair.
FlowGraph node_graph(const Shape& shape, const Counts& counts, const Replicas& replicas,
                     std::vector<int64_t>& loads_S) {
  FlowGraph graph;
  graph.ranks = shape.ranks;
  graph.supply = counts.sums().loads_E;
  graph.taken_N.assign(shape.ranks, 0);
  graph.pair_rank.reserve(replicas.slot.size());
  graph.pair_slot.reserve(replicas.slot.size());
  graph.own.reserve(replicas.slot.size());
  graph.pair_begin.reserve(replicas.slot.size() + 1);
  graph.group_begin.reserve(shape.experts + 1);
  for (int e = 0; e < shape.experts; ++e) {
    graph.group_begin.push_back(graph.groups());
    const int first = replicas.begin_E[e], last = replicas.begin_E[e + 1];
    if (last == first + 1) {
      loads_S[replicas.slot[first]] = graph.supply[e];
      graph.taken_N[replicas.rank[first]] += graph.supply[e];
      graph.supply[e] = 0;
      continue;
    }
    replicas.for_nodes(e, [&](int node, int begin, int end) {
      graph.pair_begin.push_back(graph.pairs());
      graph.own.push_back(counts.of_node(node, e));
      for (int i = begin; i < end; ++i) {
        graph.pair_rank.push_back(replicas.rank[i]);
        graph.pair_slot.push_back(replicas.slot[i]);
      }
    });
  }
  graph.index();
  return graph;
}

// Keeps tokens on their rank, node by node, as no other node matters for it: each share of an expert
// that the node takes becomes a supplier, and each of its pairs a group. A share with a single pair
// has no choice, and only takes up room.
void keep_on_ranks(const Shape& shape, const Counts& counts, const int16_t* slots_S,
                   const FlowGraph& nodes, std::vector<int64_t> room_N,
                   std::vector<int64_t>& flow) {
  std::vector<std::vector<int>> shares_Q(shape.nodes());
  for (int share = 0; share < nodes.groups(); ++share) {
    const int first = nodes.pair_begin[share], rank = nodes.pair_rank[first];
    if (nodes.pair_begin[share + 1] > first + 1) {
      shares_Q[rank / shape.node_size].push_back(share);
    } else {
      room_N[rank] -= flow[first];
    }
  }
  for (int node = 0; node < shape.nodes(); ++node) {
    FlowGraph graph;
    graph.ranks = shape.node_size;
    std::vector<int64_t> part;
    for (int share : shares_Q[node]) {
      graph.group_begin.push_back(graph.groups());
      graph.supply.push_back(0);
      for (int pair = nodes.pair_begin[share]; pair < nodes.pair_begin[share + 1]; ++pair) {
        const int rank = nodes.pair_rank[pair];
        graph.pair_begin.push_back(graph.pairs());
        graph.pair_rank.push_back(rank % shape.node_size);
        graph.own.push_back(counts(rank, slots_S[nodes.pair_slot[pair]]));
        graph.supply.back() += flow[pair];
        part.push_back(flow[pair]);
      }
    }
    graph.index();
    const auto room = room_N.begin() + static_cast<std::ptrdiff_t>(node) * shape.node_size;
    minimise_foreign(graph, {room, room + shape.node_size}, part);
    auto at = part.begin();
    for (int share : shares_Q[node]) {
      const int pairs = nodes.pair_begin[share + 1] - nodes.pair_begin[share];
      std::copy(at, at + pairs, flow.begin() + nodes.pair_begin[share]);
      at += pairs;
    }
  }
}

// A start that is local as far as ranks have room: own rank, own node, anywhere. Experts with few
// replicas first, as they have the least choice.
void fill_locally(const Shape& shape, const Counts& counts, const FlowGraph& graph,
                  std::vector<int64_t> room_N, std::vector<int64_t>& flow) {
  std::vector<int> order(graph.suppliers()), place(shape.ranks + 2, 0);
  auto first_pair = [&](int e) { return graph.pair_begin[graph.group_begin[e]]; };
  auto replicas = [&](int e) { return first_pair(e + 1) - first_pair(e); };
  for (int e = 0; e < graph.suppliers(); ++e) ++place[replicas(e) + 1];
  for (int count = 0; count <= shape.ranks; ++count) place[count + 1] += place[count];
  for (int e = 0; e < graph.suppliers(); ++e) order[place[replicas(e)]++] = e;
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
        const int64_t own = add(pair, std::min(near, counts(graph.pair_rank[pair], e)));
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
  int64_t total = std::accumulate(graph.taken_N.begin(), graph.taken_N.end(), int64_t{0});
  int64_t bound = *std::max_element(graph.taken_N.begin(), graph.taken_N.end());
  for (int e = 0; e < graph.suppliers(); ++e) {
    if (graph.supply[e] == 0) continue;
    const int64_t pairs =
        graph.pair_begin[graph.group_begin[e + 1]] - graph.pair_begin[graph.group_begin[e]];
    total += graph.supply[e];
    bound = std::max(bound, (graph.supply[e] + pairs - 1) / pairs);
  }
  return std::max(bound, (total + shape.ranks - 1) / shape.ranks);
}

}  // namespace

Sums sums_of(const Shape& shape, const int64_t* counts_NE) {
  const int experts = shape.experts;
  Sums sums{std::vector<int64_t>(static_cast<size_t>(shape.nodes()) * experts, 0),
            std::vector<int64_t>(shape.ranks), {}};
  int64_t bits = 0;
  for (int rank = 0; rank < shape.ranks; ++rank) {
    const int64_t* from = counts_NE + static_cast<int64_t>(rank) * experts;
    int64_t* to =
        sums.node_counts_QE.data() + static_cast<int64_t>(rank / shape.node_size) * experts;
    int64_t tokens = 0;
    for (int e = 0; e < experts; ++e) {
      to[e] += from[e];
      tokens += from[e];
      bits |= from[e];
    }
    sums.tokens_N[rank] = tokens;
  }
  if (bits < 0) {
    const auto size = static_cast<int64_t>(shape.ranks) * experts;
    const auto at = std::min_element(counts_NE, counts_NE + size) - counts_NE;
    throw std::invalid_argument("counts_NE holds " + std::to_string(counts_NE[at]) + " at rank " +
                                std::to_string(at / experts) + ", expert " +
                                std::to_string(at % experts) +
                                "; token counts must not be negative");
  }
  sums.loads_E = expert_loads(shape, sums.node_counts_QE.data());
  return sums;
}

std::vector<int64_t> expert_loads(const Shape& shape, const int64_t* node_counts_QE) {
  std::vector<int64_t> loads_E(shape.experts, 0);
  for (int node = 0; node < shape.nodes(); ++node) {
    const int64_t* counts_E = node_counts_QE + static_cast<int64_t>(node) * shape.experts;
    for (int e = 0; e < shape.experts; ++e) loads_E[e] += counts_E[e];
  }
  return loads_E;
}

std::vector<int64_t> slot_loads(const Shape& shape, const Counts& counts, const Replicas& replicas,
                                bool by_rank) {
  std::vector<int64_t> loads_S(shape.slots(), 0);
  const FlowGraph by_node = node_graph(shape, counts, replicas, loads_S);
  if (by_node.pairs() == 0) return loads_S;
  std::vector<int64_t> flow(by_node.pairs(), 0), room_N(shape.ranks);
  const auto set_room = [&](int64_t cap) {
    for (int rank = 0; rank < shape.ranks; ++rank) room_N[rank] = cap - by_node.taken_N[rank];
  };
  const int64_t cap = lower_bound(shape, by_node);
  set_room(cap);
  fill_locally(shape, counts, by_node, room_N, flow);
  set_room(minimise_largest_load(by_node, cap, flow));
  if (shape.nodes() > 1) minimise_foreign(by_node, room_N, flow);
  if (by_rank && shape.node_size > 1) {
    keep_on_ranks(shape, counts, replicas.slots_S, by_node, room_N, flow);
  }
  for (size_t pair = 0; pair < flow.size(); ++pair) loads_S[by_node.pair_slot[pair]] = flow[pair];
  return loads_S;
}

int64_t largest_load(const Shape& shape, const std::vector<int64_t>& loads_S) {
  int64_t most = 0;
  for (auto first = loads_S.begin(); first != loads_S.end(); first += shape.capacity) {
    most = std::max(most, std::accumulate(first, first + shape.capacity, int64_t{0}));
  }
  return most;
}

}  // namespace laer
