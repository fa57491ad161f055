// The least largest load: Dinic's maximum flow by levels, with a cap on ranks that is raised to the
// bound of a cut whenever no more flow gets through. It does not look at who owns tokens.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node,
// U suppliers.
#include <algorithm>
#include <limits>

#include "flow.hpp"

namespace laer {
namespace {

// Largest load: suppliers and ranks only, as groups do not matter for it.
class LoadFlow {
 public:
  LoadFlow(const FlowGraph& graph, int64_t cap, std::vector<int64_t>& flow)
      : graph_(graph), cap_(cap), flow_(flow) {
    const int suppliers = graph.suppliers();
    excess_ = graph.supply;
    load_ = graph.taken_N;
    for (int group : graph.group_begin) first_pair_.push_back(graph.pair_begin[group]);
    supplier_.resize(graph.pairs());
    for (int u = 0; u < suppliers; ++u) {
      for (int pair = first_pair_[u]; pair < first_pair_[u + 1]; ++pair) {
        supplier_[pair] = u;
        excess_[u] -= flow[pair];
        load_[graph.pair_rank[pair]] += flow[pair];
      }
    }
    level_.resize(suppliers + graph.ranks);
    queue_.resize(suppliers + graph.ranks);
    cursor_.resize(suppliers + graph.ranks);
  }

  int64_t run() {
    while (any_excess()) {
      if (find_levels()) {
        block();
      } else {
        raise_cap();
      }
    }
    return cap_;
  }

 private:
  bool any_excess() const {
    return std::any_of(excess_.begin(), excess_.end(), [](int64_t left) { return left > 0; });
  }

  // Breadth first from all suppliers with excess; stops at the level of the first free rank.
  bool find_levels() {
    const int suppliers = graph_.suppliers();
    std::fill(level_.begin(), level_.end(), -1);
    int head = 0, tail = 0;
    for (int u = 0; u < suppliers; ++u) {
      if (excess_[u] > 0) {
        level_[u] = 0;
        queue_[tail++] = u;
      }
    }
    int found = std::numeric_limits<int>::max();
    while (head < tail) {
      const int node = queue_[head++];
      if (level_[node] >= found) break;
      if (node < suppliers) {
        for (int pair = first_pair_[node]; pair < first_pair_[node + 1]; ++pair) {
          const int next = suppliers + graph_.pair_rank[pair];
          if (level_[next] >= 0) continue;
          level_[next] = level_[node] + 1;
          queue_[tail++] = next;
          if (load_[next - suppliers] < cap_) found = level_[next];
        }
      } else {
        const int rank = node - suppliers;
        for (int i = graph_.rank_begin[rank]; i < graph_.rank_begin[rank + 1]; ++i) {
          const int pair = graph_.rank_pair[i];
          const int next = supplier_[pair];
          if (flow_[pair] == 0 || level_[next] >= 0) continue;
          level_[next] = level_[node] + 1;
          queue_[tail++] = next;
        }
      }
    }
    visited_ = tail;
    return found != std::numeric_limits<int>::max();
  }

  // The visited suppliers reach the visited ranks only, which are full: a cut, hence a bound.
  void raise_cap() {
    const int suppliers = graph_.suppliers();
    int64_t tokens = 0, ranks = 0;
    for (int i = 0; i < visited_; ++i) {
      const int node = queue_[i];
      if (node < suppliers) {
        tokens += graph_.supply[node];
      } else {
        tokens += graph_.taken_N[node - suppliers];
        ++ranks;
      }
    }
    cap_ = (tokens + ranks - 1) / ranks;
  }

  void block() {
    const int suppliers = graph_.suppliers();
    for (int u = 0; u < suppliers; ++u) cursor_[u] = first_pair_[u];
    for (int rank = 0; rank < graph_.ranks; ++rank) {
      cursor_[suppliers + rank] = graph_.rank_begin[rank];
    }
    for (int u = 0; u < suppliers; ++u) {
      while (excess_[u] > 0 && augment(u)) {
      }
    }
  }

  // One path along rising levels, depth first; pairs on it alternate forward and backward.
  bool augment(int source) {
    const int suppliers = graph_.suppliers();
    path_.clear();
    int node = source;
    while (true) {
      if (node >= suppliers && load_[node - suppliers] < cap_) break;
      int next = -1, via = -1;
      if (node < suppliers) {
        for (int& pair = cursor_[node]; pair < first_pair_[node + 1]; ++pair) {
          const int rank_node = suppliers + graph_.pair_rank[pair];
          if (level_[rank_node] == level_[node] + 1) {
            next = rank_node;
            via = pair;
            break;
          }
        }
      } else {
        const int rank = node - suppliers;
        for (int& i = cursor_[node]; i < graph_.rank_begin[rank + 1]; ++i) {
          const int pair = graph_.rank_pair[i];
          if (flow_[pair] > 0 && level_[supplier_[pair]] == level_[node] + 1) {
            next = supplier_[pair];
            via = pair;
            break;
          }
        }
      }
      if (next >= 0) {
        path_.push_back({node, via});
        node = next;
        continue;
      }
      if (path_.empty()) return false;
      node = path_.back().node;
      path_.pop_back();
      ++cursor_[node];
    }
    int64_t amount = std::min(excess_[source], cap_ - load_[node - suppliers]);
    for (const Step& step : path_) {
      if (step.node >= suppliers) amount = std::min(amount, flow_[step.pair]);
    }
    for (const Step& step : path_) {
      flow_[step.pair] += step.node < suppliers ? amount : -amount;
    }
    excess_[source] -= amount;
    load_[node - suppliers] += amount;
    return true;
  }

  struct Step {
    int node, pair;
  };

  const FlowGraph& graph_;
  int64_t cap_;
  std::vector<int64_t>& flow_;
  std::vector<int> first_pair_, supplier_;  // of each supplier, and of each pair
  std::vector<int64_t> excess_, load_;
  std::vector<int> level_, queue_, cursor_;
  std::vector<Step> path_;
  int visited_ = 0;
};

}  // namespace

int64_t minimise_largest_load(const FlowGraph& graph, int64_t cap, std::vector<int64_t>& flow) {
  return LoadFlow(graph, cap, flow).run();
}

}  // namespace laer
