// 1. Homes are swapped while more pairs are inside nodes. 2. Nodes are filled with replicas.
// 3. Both change at random while expected rows fall.
//
// Legend: E experts, Q nodes.
#include "node_experts.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "disturb.hpp"

namespace laer {
namespace {

// Uneven loads of nodes, of the mean, that replicas even out.
constexpr double kUneven = 0.03;
// First temperature of the annealing, in rows per token.
constexpr double kTemperature = 0.002;
constexpr int kStarts = 4;

class Search {
 public:
  Search(const Pairs& pairs, int slots_per_node, uint64_t seed)
      : pairs_(pairs), slots_(std::min(slots_per_node, pairs.experts)), random_(seed),
        crossings_(pairs), by_load_E_(pairs.experts) {
    std::iota(by_load_E_.begin(), by_load_E_.end(), 0);
    std::stable_sort(by_load_E_.begin(), by_load_E_.end(),
                     [&](int a, int b) { return pairs.load(a) > pairs.load(b); });
  }

  std::vector<std::vector<int>> run(int steps) {
    place_homes();
    add_replicas();
    return annealed_homes(steps);
  }

 private:
  int experts() const { return pairs_.experts; }
  int nodes() const { return pairs_.nodes; }

  // The best of several starts: by load in turns, and permutations of that.
  void place_homes() {
    std::vector<int> node_E(experts()), best_E;
    double most = -1;
    for (int i = 0; i < experts(); ++i) {
      const int turn = i % (2 * nodes());
      node_E[by_load_E_[i]] = std::min(turn, 2 * nodes() - 1 - turn);
    }
    for (int start = 0; start < kStarts; ++start) {
      std::vector<int> found_E = node_E;
      const double inside = swap_together(found_E);
      if (inside > most) most = inside, best_E = found_E;
      for (int i = experts() - 1; i > 0; --i) std::swap(node_E[i], node_E[random_.below(i + 1)]);
    }
    homes_Q_.resize(nodes());
    replicas_Q_.resize(nodes());
    for (int e = 0; e < experts(); ++e) {
      homes_Q_[best_E[e]].push_back(e);
      crossings_.move(e, Crossings::kNowhere, best_E[e]);
    }
  }

  // Swaps the two experts that bring most pairs into nodes, until none do (Kernighan and Lin). No
  // swap makes a node heavier than all are by more than a little. Returns the pairs inside nodes.
  double swap_together(std::vector<int>& node_E) const {
    std::vector<double> in_node_EQ(static_cast<size_t>(experts()) * nodes(), 0), load_Q(nodes(), 0);
    auto pairs_in = [&](int expert, int node) -> double& {
      return in_node_EQ[static_cast<size_t>(expert) * nodes() + node];
    };
    double total = 0;
    for (int e = 0; e < experts(); ++e) {
      for (int other = 0; other < experts(); ++other) {
        if (other != e) pairs_in(e, node_E[other]) += pairs_.of(e)[other];
      }
      load_Q[node_E[e]] += pairs_.load(e);
      total += pairs_.load(e);
    }
    const double most = (1 + kUneven) * total / nodes();
    for (int swaps = 0; swaps < 20 * experts(); ++swaps) {
      double best = 0;
      int one = -1, two = -1;
      for (int a = 0; a < experts(); ++a) {
        const double* pairs_E = pairs_.of(a);
        const int here = node_E[a];
        for (int b = a + 1; b < experts(); ++b) {
          const int there = node_E[b];
          if (there == here) continue;
          const double gain = pairs_in(a, there) + pairs_in(b, here) - 2 * pairs_E[b] -
                              pairs_in(a, here) - pairs_in(b, there);
          if (gain <= best) continue;
          const double more = pairs_.load(b) - pairs_.load(a);
          const double after = std::max(load_Q[here] + more, load_Q[there] - more);
          if (after > most && after > std::max(load_Q[here], load_Q[there])) continue;
          best = gain, one = a, two = b;
        }
      }
      if (one < 0) break;
      const int here = node_E[one], there = node_E[two];
      std::swap(node_E[one], node_E[two]);
      const double more = pairs_.load(two) - pairs_.load(one);
      load_Q[here] += more;
      load_Q[there] -= more;
      for (int e = 0; e < experts(); ++e) {
        const double left = e == one ? 0 : pairs_.of(e)[one];
        const double came = e == two ? 0 : pairs_.of(e)[two];
        pairs_in(e, here) += came - left;
        pairs_in(e, there) += left - came;
      }
    }
    double inside = 0;
    for (int e = 0; e < experts(); ++e) inside += pairs_in(e, node_E[e]);
    return inside;
  }

  void add_replica(int node, int expert) {
    if (crossings_.hosts(node, expert) || room(node) == 0) return;
    replicas_Q_[node].push_back(expert);
    crossings_.move(expert, Crossings::kNowhere, node);
  }

  int room(int node) const {
    return slots_ - static_cast<int>(homes_Q_[node].size() + replicas_Q_[node].size());
  }

  // Each node gets its most chosen others. Nodes start elsewhere among these, so that experts have
  // two nodes before four.
  void add_replicas() {
    for (int node = 0; node < nodes(); ++node) {
      std::vector<int> others;
      for (int e : by_load_E_) {
        if (!crossings_.hosts(node, e)) others.push_back(e);
      }
      const int free = room(node), tried = std::min<int>(2 * free, static_cast<int>(others.size()));
      for (int i = 0; i < tried; ++i) {
        add_replica(node, others[(i + static_cast<int64_t>(node) * free / nodes()) % tried]);
      }
    }
  }

  // Expected rows, and more of them for nodes that differ in load.
  double score() const {
    double mean = 0, uneven = 0;
    for (int node = 0; node < nodes(); ++node) mean += crossings_.node_load(node) / nodes();
    for (int node = 0; node < nodes(); ++node) {
      uneven += std::max(std::abs(crossings_.node_load(node) / mean - 1) - kUneven, 0.0);
    }
    return crossings_.rows() + uneven;
  }

  // One change: the expert at a place of a node becomes another, and where it is swapped, another
  // node's place gets it.
  struct Change {
    std::vector<int>* place_X;
    int node, at, expert;
    std::vector<int>* other_X = nullptr;
    int other_node = 0, other_at = 0;
  };

  bool draw(Change& change) {
    const int kind = random_.below(3);
    auto& lists_Q = kind == 0 ? homes_Q_ : replicas_Q_;
    change.node = random_.below(nodes());
    change.place_X = &lists_Q[change.node];
    if (change.place_X->empty()) return false;
    change.at = random_.below(static_cast<int>(change.place_X->size()));
    if (kind == 2) {
      change.expert = random_.below(experts());
      return !crossings_.hosts(change.node, change.expert);
    }
    change.other_node = random_.below(nodes());
    change.other_X = &lists_Q[change.other_node];
    if (change.other_node == change.node || change.other_X->empty()) return false;
    change.other_at = random_.below(static_cast<int>(change.other_X->size()));
    change.expert = (*change.other_X)[change.other_at];
    return !crossings_.hosts(change.node, change.expert) &&
           !crossings_.hosts(change.other_node, (*change.place_X)[change.at]);
  }

  // Applied twice, a change is undone.
  void apply(Change& change) {
    int& expert = (*change.place_X)[change.at];
    const bool is_swap = change.other_X != nullptr;
    const int other = is_swap ? change.other_node : Crossings::kNowhere;
    crossings_.move(change.expert, other, change.node);
    crossings_.move(expert, change.node, other);
    if (is_swap) (*change.other_X)[change.other_at] = expert;
    std::swap(expert, change.expert);
  }

  std::vector<std::vector<int>> annealed_homes(int steps) {
    double now = score(), least = now;
    std::vector<std::vector<int>> best_Q = homes_Q_;
    for (int step = 0; step < steps; ++step) {
      Change change;
      if (!draw(change)) continue;
      apply(change);
      const double after = score();
      const double heat = kTemperature * (1 - static_cast<double>(step) / steps);
      if (after < now - heat * std::log(1 - random_.uniform())) {
        now = after;
        if (now < least) least = now, best_Q = homes_Q_;
      } else {
        apply(change);
      }
    }
    return best_Q;
  }

  const Pairs& pairs_;
  const int slots_;
  Random random_;
  Crossings crossings_;
  std::vector<int> by_load_E_;
  std::vector<std::vector<int>> homes_Q_, replicas_Q_;  // replicas are other experts of a node
};

}  // namespace

std::vector<std::vector<int>> choose_nodes(const Pairs& pairs, int slots_per_node, int steps,
                                           uint64_t seed) {
  return Search(pairs, slots_per_node, seed).run(steps);
}

}  // namespace laer
