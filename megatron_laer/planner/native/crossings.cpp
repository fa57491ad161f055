// Expected rows between nodes: sums over experts are kept, and a move changes few of them.
//
// Legend: E experts, Q nodes, K experts of a token.
#include "crossings.hpp"

namespace laer {

Crossings::Crossings(const Pairs& pairs, const std::vector<int>& node_E)
    : pairs_(pairs), node_E_(node_E),
      sets_Q_(pairs.nodes, {0, 0, std::vector<double>(pairs.experts, 0)}) {
  for (int e = 0; e < pairs.experts; ++e) {
    tokens_ += pairs.load(e) / pairs.top_k;
    change(node_E[e], e, 1);
  }
}

void Crossings::move(int expert, int to) {
  change(node_E_[expert], expert, -1);
  change(to, expert, 1);
  node_E_[expert] = to;
}

void Crossings::change(int node, int expert, double sign) {
  Set& set = sets_Q_[node];
  const double* pairs_E = pairs_.of(expert);
  set.square += sign * 2 * set.together_E[expert] + pairs_E[expert];
  set.load += sign * pairs_.load(expert);
  for (int e = 0; e < pairs_.experts; ++e) set.together_E[e] += sign * pairs_E[e];
}

double Crossings::rows() const {
  double visits = 0;
  for (const Set& set : sets_Q_) visits += 1 - missed(set);
  return visits * (pairs_.nodes - 1) / pairs_.nodes;
}

// The share of tokens with no expert of a set.
double Crossings::missed(const Set& set) const {
  const int draws = pairs_.top_k;
  const double mean = set.load / tokens_, miss = 1 - mean / draws;
  const double even = std::max(draws * miss * (1 - miss), 1e-9);
  double likeness = ((set.square / tokens_ - mean * mean) / even - 1) / std::max(draws - 1, 1);
  likeness = std::clamp(likeness, -0.9 / draws, 0.9);
  const double pull = likeness / (1 - likeness);
  double none = 1;
  for (int drawn = 0; drawn < draws; ++drawn) {
    none *= std::clamp((miss + drawn * pull) / (1 + drawn * pull), 0.0, 1.0);
  }
  return none;
}

}  // namespace laer
