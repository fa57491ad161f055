// Rows between nodes that counts of pairs of experts lead us to expect, and how they change when an
// expert moves to another node. It does not search: see node_experts.hpp.
//
// Legend: E experts, Q nodes, K experts of a token.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace laer {

// Tokens that chose both of two experts, on the diagonal those of one. Nodes are alike: each has an
// equal part of an expert's tokens.
struct Pairs {
  int experts, nodes, top_k;
  std::vector<double> pairs_EE;

  const double* of(int expert) const { return pairs_EE.data() + int64_t{expert} * experts; }
  double load(int expert) const { return std::max(of(expert)[expert], 1.0); }
};

// Each expert is on one node, to which it leads tokens. The number of a token's experts on a node
// has a known mean and variance, and a Polya urn with both gives the share of tokens with none.
class Crossings {
 public:
  Crossings(const Pairs& pairs, const std::vector<int>& node_E);

  int node(int expert) const { return node_E_[expert]; }
  void move(int expert, int to);

  // Rows of a token to other nodes than its own.
  double rows() const;

  // Pairs of a token and an expert that a node computes.
  double load(int node) const { return sets_Q_[node].load; }

 private:
  // The experts of a node.
  struct Set {
    double load = 0, square = 0;
    std::vector<double> together_E;
  };

  void change(int node, int expert, double sign);
  double missed(const Set& set) const;

  const Pairs& pairs_;
  double tokens_ = 0;
  std::vector<int> node_E_;
  std::vector<Set> sets_Q_;
};

}  // namespace laer
