// 1. Experts are swapped while more pairs are inside nodes. 2. They change nodes at random while
// expected rows fall.
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

// Swaps the two experts that bring most pairs into nodes, until none do (Kernighan and Lin). No
// swap makes a node heavier than all are by more than a little. Returns the pairs inside nodes.
double swap_together(const Pairs& pairs, std::vector<int>& node_E) {
  const int experts = pairs.experts, nodes = pairs.nodes;
  std::vector<double> in_node_EQ(static_cast<size_t>(experts) * nodes, 0), load_Q(nodes, 0);
  auto pairs_in = [&](int expert, int node) -> double& {
    return in_node_EQ[static_cast<size_t>(expert) * nodes + node];
  };
  double total = 0;
  for (int e = 0; e < experts; ++e) {
    for (int other = 0; other < experts; ++other) {
      if (other != e) pairs_in(e, node_E[other]) += pairs.of(e)[other];
    }
    load_Q[node_E[e]] += pairs.load(e);
    total += pairs.load(e);
  }
  const double most = (1 + kUneven) * total / nodes;
  for (int swaps = 0; swaps < 20 * experts; ++swaps) {
    double best = 0;
    int one = -1, two = -1;
    for (int a = 0; a < experts; ++a) {
      const double* pairs_E = pairs.of(a);
      const int here = node_E[a];
      for (int b = a + 1; b < experts; ++b) {
        const int there = node_E[b];
        if (there == here) continue;
        const double gain = pairs_in(a, there) + pairs_in(b, here) - 2 * pairs_E[b] -
                            pairs_in(a, here) - pairs_in(b, there);
        if (gain <= best) continue;
        const double more = pairs.load(b) - pairs.load(a);
        const double after = std::max(load_Q[here] + more, load_Q[there] - more);
        if (after > most && after > std::max(load_Q[here], load_Q[there])) continue;
        best = gain, one = a, two = b;
      }
    }
    if (one < 0) break;
    const int here = node_E[one], there = node_E[two];
    std::swap(node_E[one], node_E[two]);
    const double more = pairs.load(two) - pairs.load(one);
    load_Q[here] += more;
    load_Q[there] -= more;
    for (int e = 0; e < experts; ++e) {
      const double left = e == one ? 0 : pairs.of(e)[one];
      const double came = e == two ? 0 : pairs.of(e)[two];
      pairs_in(e, here) += came - left;
      pairs_in(e, there) += left - came;
    }
  }
  double inside = 0;
  for (int e = 0; e < experts; ++e) inside += pairs_in(e, node_E[e]);
  return inside;
}

// The best of several starts: by load in turns, and permutations of that.
std::vector<int> place(const Pairs& pairs, Random& random) {
  const int experts = pairs.experts, nodes = pairs.nodes;
  std::vector<int> by_load_E(experts), node_E(experts), best_E;
  std::iota(by_load_E.begin(), by_load_E.end(), 0);
  std::stable_sort(by_load_E.begin(), by_load_E.end(),
                   [&](int a, int b) { return pairs.load(a) > pairs.load(b); });
  for (int i = 0; i < experts; ++i) {
    const int turn = i % (2 * nodes);
    node_E[by_load_E[i]] = std::min(turn, 2 * nodes - 1 - turn);
  }
  double most = -1;
  for (int start = 0; start < kStarts; ++start) {
    std::vector<int> found_E = node_E;
    const double inside = swap_together(pairs, found_E);
    if (inside > most) most = inside, best_E = found_E;
    for (int i = experts - 1; i > 0; --i) std::swap(node_E[i], node_E[random.below(i + 1)]);
  }
  return best_E;
}

// Expected rows, and more of them for nodes that differ in load.
double score(const Pairs& pairs, const Crossings& crossings) {
  double mean = 0, uneven = 0;
  for (int node = 0; node < pairs.nodes; ++node) mean += crossings.load(node) / pairs.nodes;
  for (int node = 0; node < pairs.nodes; ++node) {
    uneven += std::max(std::abs(crossings.load(node) / mean - 1) - kUneven, 0.0);
  }
  return crossings.rows() + uneven;
}

}  // namespace

std::vector<int> choose_nodes(const Pairs& pairs, int steps, uint64_t seed) {
  Random random(seed);
  std::vector<int> best_E = place(pairs, random);
  Crossings crossings(pairs, best_E);
  double now = score(pairs, crossings), least = now;
  const auto swap = [&](int one, int other) {
    const int here = crossings.node(one), there = crossings.node(other);
    crossings.move(one, there);
    crossings.move(other, here);
  };
  for (int step = 0; step < steps; ++step) {
    const int one = random.below(pairs.experts), other = random.below(pairs.experts);
    if (crossings.node(one) == crossings.node(other)) continue;
    swap(one, other);
    const double after = score(pairs, crossings);
    const double heat = kTemperature * (1 - static_cast<double>(step) / steps);
    if (after >= now - heat * std::log(1 - random.uniform())) {
      swap(one, other);
      continue;
    }
    now = after;
    if (now >= least) continue;
    least = now;
    for (int e = 0; e < pairs.experts; ++e) best_E[e] = crossings.node(e);
  }
  return best_E;
}

}  // namespace laer
