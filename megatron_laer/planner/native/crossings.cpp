// Expected rows between nodes: sums over experts are kept, and a move changes few of them.
//
// Legend: E experts, Q nodes, K experts of a token.
#include "crossings.hpp"

#include <algorithm>

namespace laer {

double Pairs::load(int expert) const { return std::max(of(expert)[expert], 1.0); }

Crossings::Crossings(const Pairs& pairs) : pairs_(pairs) {
  const int nodes = pairs.nodes, experts = pairs.experts;
  load_E_.resize(experts);
  load_Q_.assign(nodes, 0);
  for (int e = 0; e < experts; ++e) {
    load_E_[e] = pairs.load(e);
    tokens_ += load_E_[e] / pairs.top_k;
    tokens_of_node_ += pairs.load_of_node(e) / pairs.top_k;
  }
  for (int node = 0; node < nodes; ++node) tokens_of_nodes_ += tokens_of_node_;
  hosts_QE_.assign(at(nodes, 0), 0);
  hosts_E_.assign(experts, 0);
  sets_Q_.assign(nodes, {0, 0, std::vector<char>(experts, 0), std::vector<double>(experts, 0)});
}

void Crossings::update(int node, int expert) {
  Set& set = sets_Q_[node];
  const bool has = hosts(node, expert) && hosts_E_[expert] == 1;
  if (has == (set.has_E[expert] != 0)) return;
  set.has_E[expert] = has;
  const double sign = has ? 1 : -1;
  const double* pairs_E = pairs_.of(expert);
  set.square += sign * 2 * set.together_E[expert] + pairs_E[expert];
  set.load += sign * load_E_[expert];
  for (int e = 0; e < pairs_.experts; ++e) set.together_E[e] += sign * pairs_E[e];
}

void Crossings::move(int expert, int from, int to) {
  if (hosts_E_[expert] > 0) add_load(expert, -1);
  auto change = [&](int node, int by) {
    if (node == kNowhere) return;
    hosts_QE_[at(node, expert)] = by > 0;
    hosts_E_[expert] += by;
  };
  change(from, -1);
  change(to, 1);
  if (hosts_E_[expert] > 0) add_load(expert, 1);
  for (int node = 0; node < pairs_.nodes; ++node) update(node, expert);
}

void Crossings::add_load(int expert, double sign) {
  double far = 0;  // of each node, from nodes without the expert
  for (int source = 0; source < pairs_.nodes; ++source) {
    if (!hosts(source, expert)) far += pairs_.load_of_node(expert);
  }
  far /= hosts_E_[expert];
  for (int node = 0; node < pairs_.nodes; ++node) {
    if (hosts(node, expert)) load_Q_[node] += sign * (far + pairs_.load_of_node(expert));
  }
}

double Crossings::rows() const {
  double rows = 0;
  for (int node = 0; node < pairs_.nodes; ++node) {
    if (sets_Q_[node].load > 0) rows += visits(node);
  }
  for (int e = 0; e < pairs_.experts; ++e) {
    if (hosts_E_[e] > 1) rows += rows_with_choice(e);
  }
  return rows / tokens_of_nodes_;
}

// Tokens of other nodes with an expert of a node's set.
double Crossings::visits(int node) const {
  const Set& set = sets_Q_[node];
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
  double tokens = 0;
  for (int other = 1; other < pairs_.nodes; ++other) tokens += tokens_of_node_ * (1 - none);
  return tokens;
}

// The share of an expert's tokens that have no other expert of a node's set.
double Crossings::missed(int node, int expert) const {
  const int others = pairs_.top_k - 1;
  const double share = sets_Q_[node].together_E[expert] / load_E_[expert] / std::max(others, 1);
  double none = 1;
  for (int other = 0; other < others; ++other) none *= 1 - std::min(share, 1.0);
  return none;
}

// Tokens that go to a node for this expert alone, although they could choose among nodes.
double Crossings::rows_with_choice(int expert) const {
  double none = 1;
  for (int node = 0; node < pairs_.nodes; ++node) {
    if (hosts(node, expert)) none *= missed(node, expert);
  }
  double tokens = 0;
  for (int source = 0; source < pairs_.nodes; ++source) {
    if (!hosts(source, expert)) tokens += none * pairs_.load_of_node(expert);
  }
  return tokens;
}

}  // namespace laer
