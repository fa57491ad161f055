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
class ForeignFlow {
 public:
  ForeignFlow(const FlowGraph& graph, int64_t cap, std::vector<int64_t>& flow)
      : graph_(graph),
        cap_(cap),
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
    potential_.assign(nodes, 0);
    distance_.resize(nodes);
    level_.resize(nodes);
    cursor_.resize(nodes);
    queue_.resize(nodes);
  }

  void run() {
    while (left_ > 0) {
      find_distances();
      while (left_ > 0 && find_levels()) block();
    }
  }

 private:
  // Arcs out of a node by position; returns false past the last one. cost and room are of the
  // residual arc, room 0 where it is closed.
  struct Arc {
    int to;
    int cost;
    int64_t room;
    int pair;
  };

  bool arc(int node, int position, Arc& out) const {
    if (node < group0_) {
      const int group = graph_.group_begin[node] + position;
      if (group >= graph_.group_begin[node + 1]) return false;
      const int64_t spare = graph_.own[group] - taken_[group];
      out = {group0_ + group, spare > 0 ? 0 : 1, spare > 0 ? spare : kMany, -1};
      return true;
    }
    if (node < rank0_) {
      const int group = node - group0_;
      if (position == 0) {
        const int64_t foreign = taken_[group] - graph_.own[group];
        out = {graph_.group_supplier[group], foreign > 0 ? -1 : 0,
               foreign > 0 ? foreign : taken_[group], -1};
        return true;
      }
      const int pair = graph_.pair_begin[group] + position - 1;
      if (pair >= graph_.pair_begin[group + 1]) return false;
      out = {rank0_ + graph_.pair_rank[pair], 0, kMany, pair};
      return true;
    }
    if (node < sink_) {
      const int rank = node - rank0_;
      if (position == 0) {
        out = {sink_, 0, cap_ - load_[rank], -1};
        return true;
      }
      const int at = graph_.rank_begin[rank] + position - 1;
      if (at >= graph_.rank_begin[rank + 1]) return false;
      const int pair = graph_.rank_pair[at];
      out = {group0_ + graph_.pair_group[pair], 0, flow_[pair], pair};
      return true;
    }
    if (position >= graph_.ranks) return false;
    out = {rank0_ + position, 0, load_[position], -1};
    return true;
  }

  int reduced(int node, const Arc& out) const {
    return out.cost + potential_[node] - potential_[out.to];
  }

  // Dijkstra with buckets: reduced costs are small integers.
  void find_distances() {
    const int unreached = std::numeric_limits<int>::max();
    std::fill(distance_.begin(), distance_.end(), unreached);
    buckets_.resize(1);
    buckets_[0].clear();
    for (int u = 0; u < group0_; ++u) {
      if (excess_[u] > 0) {
        distance_[u] = 0;
        buckets_[0].push_back(u);
      }
    }
    int nearest = unreached;
    for (int at = 0; at < static_cast<int>(buckets_.size()) && at <= nearest; ++at) {
      for (size_t i = 0; i < buckets_[at].size(); ++i) {
        const int node = buckets_[at][i];
        if (distance_[node] != at) continue;
        if (is_target(node)) nearest = std::min(nearest, at);
        Arc out;
        for (int position = 0; arc(node, position, out); ++position) {
          if (out.room == 0) continue;
          const int reach = at + reduced(node, out);
          if (reach >= distance_[out.to]) continue;
          distance_[out.to] = reach;
          while (static_cast<int>(buckets_.size()) <= reach) buckets_.emplace_back();
          buckets_[reach].push_back(out.to);
        }
      }
      buckets_[at].clear();
    }
    for (auto& bucket : buckets_) bucket.clear();
    for (size_t node = 0; node < distance_.size(); ++node) {
      potential_[node] += std::min(distance_[node], nearest);
    }
  }

  bool is_target(int node) const {
    return node >= group0_ && node < rank0_ && deficit_[node - group0_] > 0;
  }

  bool find_levels() {
    std::fill(level_.begin(), level_.end(), -1);
    int head = 0, tail = 0;
    for (int u = 0; u < group0_; ++u) {
      if (excess_[u] > 0) {
        level_[u] = 0;
        queue_[tail++] = u;
      }
    }
    int found = std::numeric_limits<int>::max();
    while (head < tail) {
      const int node = queue_[head++];
      // Paths of this round end at the level of the nearest deficit.
      if (level_[node] >= found) break;
      if (is_target(node)) {
        found = level_[node];
        continue;
      }
      Arc out;
      for (int position = 0; arc(node, position, out); ++position) {
        if (out.room == 0 || level_[out.to] >= 0 || reduced(node, out) != 0) continue;
        level_[out.to] = level_[node] + 1;
        queue_[tail++] = out.to;
      }
    }
    return found != std::numeric_limits<int>::max();
  }

  void block() {
    std::fill(cursor_.begin(), cursor_.end(), 0);
    for (int u = 0; u < group0_; ++u) {
      while (excess_[u] > 0 && augment(u)) {
      }
    }
  }

  bool augment(int source) {
    path_.clear();
    int node = source;
    int64_t amount = excess_[source];
    while (!is_target(node)) {
      Arc out;
      bool moved = false;
      for (int& position = cursor_[node]; arc(node, position, out); ++position) {
        if (out.room > 0 && level_[out.to] == level_[node] + 1 && reduced(node, out) == 0) {
          moved = true;
          break;
        }
      }
      if (moved) {
        path_.push_back({node, out});
        node = out.to;
        continue;
      }
      if (path_.empty()) return false;
      node = path_.back().node;
      path_.pop_back();
      ++cursor_[node];
    }
    amount = std::min(amount, deficit_[node - group0_]);
    for (const Step& step : path_) amount = std::min(amount, step.out.room);
    for (const Step& step : path_) push(step.node, step.out, amount);
    excess_[source] -= amount;
    deficit_[node - group0_] -= amount;
    left_ -= amount;
    return true;
  }

  void push(int node, const Arc& out, int64_t amount) {
    if (node < group0_) {
      taken_[out.to - group0_] += amount;
    } else if (node < rank0_) {
      if (out.pair >= 0) {
        flow_[out.pair] += amount;
        // The rank keeps what it passes on to another pair; see the branch below.
        load_[out.to - rank0_] += amount;
      } else {
        taken_[node - group0_] -= amount;
      }
    } else if (node < sink_) {
      if (out.pair >= 0) {
        flow_[out.pair] -= amount;
        load_[node - rank0_] -= amount;
      }
    }
  }

  struct Step {
    int node;
    Arc out;
  };

  const FlowGraph& graph_;
  int64_t cap_;
  std::vector<int64_t>& flow_;
  const int group0_, rank0_, sink_;
  std::vector<int64_t> load_, taken_, deficit_, excess_;
  int64_t left_ = 0;
  std::vector<int> potential_, distance_, level_, cursor_, queue_;
  std::vector<std::vector<int>> buckets_;
  std::vector<Step> path_;
};

}  // namespace

void minimise_foreign(const FlowGraph& graph, int64_t cap, std::vector<int64_t>& flow) {
  ForeignFlow(graph, cap, flow).run();
}

}  // namespace laer
