// The fewest foreign tokens with ranks within a cap: all foreign flow is undone, and sent again by
// successive shortest paths, all of one length at a time (primal-dual). It keeps the cap as it is.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node,
// U suppliers.
#include <algorithm>
#include <limits>

#include "flow.hpp"

namespace laer {
namespace {

constexpr int64_t kMany = std::numeric_limits<int64_t>::max() / 4;

// Fewest foreign tokens. Nodes: suppliers, groups, ranks, and one sink that stands for free
// capacity. `taken` is what a group takes from its supplier; a group short of what its pairs carry
// is a deficit, a supplier with tokens left is an excess, and flow goes from the one to the other.
//
// Paths use arcs that have room and cost nothing beyond the difference of the potentials. Where
// none is left, the potentials of all nodes that the search did not reach rise by one.
class ForeignFlow {
 public:
  ForeignFlow(const FlowGraph& graph, const std::vector<int64_t>& cap_N,
              std::vector<int64_t>& flow)
      : graph_(graph),
        cap_N_(cap_N),
        flow_(flow),
        group0_(graph.suppliers()),
        rank0_(group0_ + graph.groups()),
        sink_(rank0_ + graph.ranks) {
    const int nodes = sink_ + 1;
    load_.assign(graph.ranks, 0);
    taken_.resize(graph.groups());
    deficit_.resize(graph.groups());
    excess_ = graph.supply;
    for (int group = 0; group < graph.groups(); ++group) {
      int64_t carried = 0;
      for (int pair = graph.pair_begin[group]; pair < graph.pair_begin[group + 1]; ++pair) {
        carried += flow[pair];
        load_[graph.pair_rank[pair]] += flow[pair];
      }
      taken_[group] = std::min(carried, graph.own[group]);
      deficit_[group] = carried - taken_[group];
      left_ += deficit_[group];
      excess_[graph.group_supplier[group]] -= taken_[group];
    }
    number_arcs();
    for (int group = 0; group < graph.groups(); ++group) note_taken(group);
    for (int rank = 0; rank < graph.ranks; ++rank) note_load(rank);
    for (int pair = 0; pair < graph.pairs(); ++pair) note_flow(pair);
    mark_.assign(nodes, kNoLevel);
    queue_.resize(nodes + 1);
    path_.reserve(nodes);
  }

  void run() {
    while (left_ > 0) {
      if (find_levels()) {
        send();
      } else {
        for (int64_t& mark : mark_) mark += (mark & kNoLevel) == kNoLevel ? kPotential : 0;
      }
    }
  }

 private:
  // A node's mark is its potential and, below, its level. Along an arc that paths may use the mark
  // changes by the arc's step: the cost and one level. A closed arc has a step to no mark.
  static constexpr int64_t kPotential = int64_t{1} << 32, kNoLevel = kPotential - 1;
  static constexpr int64_t kClosed = std::numeric_limits<int64_t>::min() / 2;

  // Arcs of the residual graph lie by the node that they leave: of suppliers to their groups; of
  // groups to the supplier and then along their pairs; of ranks to the sink and then back along
  // their pairs; of the sink to the ranks.
  void number_arcs() {
    const int groups = graph_.groups(), pairs = graph_.pairs();
    to_.resize(2 * (groups + pairs + graph_.ranks));
    step_.assign(to_.size(), 1);
    back_.resize(pairs);
    first_ = graph_.group_begin;
    first_.resize(sink_ + 2);
    for (int group = 0; group < groups; ++group) to_[group] = group0_ + group;
    int arc = groups;
    for (int group = 0; group < groups; ++group) {
      first_[group0_ + group] = arc;
      to_[arc++] = graph_.group_supplier[group];
      for (int pair = graph_.pair_begin[group]; pair < graph_.pair_begin[group + 1]; ++pair) {
        to_[arc++] = rank0_ + graph_.pair_rank[pair];
      }
    }
    for (int rank = 0; rank < graph_.ranks; ++rank) {
      first_[rank0_ + rank] = arc;
      to_[arc++] = sink_;
      for (int i = graph_.rank_begin[rank]; i < graph_.rank_begin[rank + 1]; ++i) {
        const int pair = graph_.rank_pair[i];
        back_[pair] = arc;
        to_[arc++] = group0_ + graph_.pair_group[pair];
      }
    }
    first_[sink_] = arc;
    for (int rank = 0; rank < graph_.ranks; ++rank) to_[arc++] = rank0_ + rank;
    first_[sink_ + 1] = arc;
  }

  void note_taken(int group) {
    const int64_t spare = graph_.own[group] - taken_[group];
    step_[group] = spare > 0 ? 1 : 1 + kPotential;
    step_[first_[group0_ + group]] = spare < 0 ? 1 - kPotential : taken_[group] > 0 ? 1 : kClosed;
  }

  void note_load(int rank) {
    step_[first_[rank0_ + rank]] = load_[rank] < cap_N_[rank] ? 1 : kClosed;
    step_[first_[sink_] + rank] = load_[rank] > 0 ? 1 : kClosed;
  }

  void note_flow(int pair) { step_[back_[pair]] = flow_[pair] > 0 ? 1 : kClosed; }

  bool is_target(int node) const {
    return node >= group0_ && node < rank0_ && deficit_[node - group0_] > 0;
  }

  // Breadth first from all suppliers with excess; paths end at the level of the nearest deficit.
  bool find_levels() {
    for (int64_t& mark : mark_) mark |= kNoLevel;
    int* tail = queue_.data();
    for (int u = 0; u < group0_; ++u) {
      if (excess_[u] > 0) {
        mark_[u] &= ~kNoLevel;
        *tail++ = u;
      }
    }
    int64_t found = kNoLevel;
    for (const int* head = queue_.data(); head < tail; ++head) {
      const int node = *head;
      const int64_t mark = mark_[node];
      if ((mark & kNoLevel) >= found) break;
      if (is_target(node)) {
        found = mark & kNoLevel;
        continue;
      }
      // Without branches, as none could be foreseen.
      for (int arc = first_[node]; arc < first_[node + 1]; ++arc) {
        const int64_t reached = mark + step_[arc], before = mark_[to_[arc]];
        const int64_t is_new = before == (reached | kNoLevel);
        *tail = to_[arc];
        tail += is_new;
        mark_[to_[arc]] = before ^ ((before ^ reached) & -is_new);
      }
    }
    if (found == kNoLevel) return false;
    // Nodes from which no path goes on lose their level again.
    const int64_t deepest = mark_[tail[-1]] & kNoLevel;
    while (tail != queue_.data()) {
      const int node = *--tail;
      if (is_target(node)) continue;
      const int64_t mark = mark_[node];
      int64_t goes_on = 0;
      if ((mark & kNoLevel) < deepest) {
        for (int arc = first_[node]; arc < first_[node + 1]; ++arc) {
          goes_on |= mark_[to_[arc]] == mark + step_[arc];
        }
      }
      mark_[node] = mark | (kNoLevel & (goes_on - 1));
    }
    return true;
  }

  bool is_open(int node, int arc) const { return mark_[to_[arc]] == mark_[node] + step_[arc]; }

  // Paths along rising levels, depth first from one supplier after the other.
  void send() {
    cursor_ = first_;
    for (int u = 0; u < group0_; ++u) {
      path_.clear();
      int node = u;
      while (excess_[u] > 0) {
        if (is_target(node)) {
          node = augment(u, node);
          continue;
        }
        int& arc = cursor_[node];
        while (arc < first_[node + 1] && !is_open(node, arc)) ++arc;
        if (arc < first_[node + 1]) {
          path_.push_back(node);
          node = to_[arc];
        } else if (path_.empty()) {
          break;
        } else {
          node = path_.back();
          path_.pop_back();
          ++cursor_[node];
        }
      }
    }
  }

  // Sends what fits along the path to a target; returns the node to go on from, which the arcs of
  // what is left of the path still lead to.
  int augment(int source, int target) {
    int64_t amount = std::min(excess_[source], deficit_[target - group0_]);
    for (int node : path_) amount = std::min(amount, room(node, cursor_[node]));
    for (int node : path_) push(node, cursor_[node], amount);
    excess_[source] -= amount;
    deficit_[target - group0_] -= amount;
    left_ -= amount;
    for (size_t i = 0; i < path_.size(); ++i) {
      const int node = path_[i];
      if (is_open(node, cursor_[node])) continue;
      path_.resize(i);
      return node;
    }
    return target;
  }

  // The pair of an arc out of a rank that does not lead to the sink.
  int pair_back(int node, int arc) const {
    return graph_.rank_pair[graph_.rank_begin[node - rank0_] + arc - first_[node] - 1];
  }

  int64_t room(int node, int arc) const {
    if (node < group0_) {
      const int64_t spare = graph_.own[arc] - taken_[arc];
      return spare > 0 ? spare : kMany;
    }
    if (node < rank0_) {
      if (arc != first_[node]) return kMany;
      const int group = node - group0_;
      const int64_t foreign = taken_[group] - graph_.own[group];
      return foreign > 0 ? foreign : taken_[group];
    }
    if (node == sink_) return load_[arc - first_[node]];
    return arc == first_[node] ? cap_N_[node - rank0_] - load_[node - rank0_] : flow_[pair_back(node, arc)];
  }

  void push(int node, int arc, int64_t amount) {
    if (node < group0_) {
      taken_[arc] += amount;
      note_taken(arc);
    } else if (node < rank0_) {
      const int group = node - group0_;
      if (arc == first_[node]) {
        taken_[group] -= amount;
        note_taken(group);
      } else {
        // The rank keeps what it passes on to another pair; see the branch below.
        carry(graph_.pair_begin[group] + arc - first_[node] - 1, amount);
      }
    } else if (node != sink_ && arc != first_[node]) {
      carry(pair_back(node, arc), -amount);
    }
  }

  void carry(int pair, int64_t more) {
    flow_[pair] += more;
    load_[graph_.pair_rank[pair]] += more;
    note_flow(pair);
    note_load(graph_.pair_rank[pair]);
  }

  const FlowGraph& graph_;
  const std::vector<int64_t>& cap_N_;
  std::vector<int64_t>& flow_;
  const int group0_, rank0_, sink_;
  std::vector<int64_t> load_, taken_, deficit_, excess_;
  int64_t left_ = 0;
  std::vector<int> first_, to_, back_;
  std::vector<int64_t> step_, mark_;
  std::vector<int> cursor_, queue_, path_;
};

// Every way to fewer foreign tokens moves one from a group that has foreign ones to another group of
// its supplier that could take more of its own. Often there is none.
bool may_improve(const FlowGraph& graph, const std::vector<int64_t>& flow) {
  for (int u = 0; u < graph.suppliers(); ++u) {
    bool has_foreign = false, has_spare = false;
    for (int group = graph.group_begin[u]; group < graph.group_begin[u + 1]; ++group) {
      int64_t carried = 0;
      for (int pair = graph.pair_begin[group]; pair < graph.pair_begin[group + 1]; ++pair) {
        carried += flow[pair];
      }
      has_foreign |= carried > graph.own[group];
      has_spare |= carried < graph.own[group];
    }
    if (has_foreign && has_spare) return true;
  }
  return false;
}

}  // namespace

void minimise_foreign(const FlowGraph& graph, const std::vector<int64_t>& cap_N,
                      std::vector<int64_t>& flow) {
  if (may_improve(graph, flow)) ForeignFlow(graph, cap_N, flow).run();
}

}  // namespace laer
