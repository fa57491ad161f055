// Rows between nodes that counts of pairs of experts lead us to expect, and how they change when an
// expert moves to another node. It does not search: see node_experts.hpp.
//
// Legend: E experts, Q nodes, K experts of a token.
#pragma once

#include <cstdint>
#include <vector>

namespace laer {

// Tokens that chose both of two experts, on the diagonal those of one. Nodes are alike: each has an
// equal part of an expert's tokens.
struct Pairs {
  int experts, nodes, top_k;
  std::vector<double> pairs_EE;

  const double* of(int expert) const { return pairs_EE.data() + int64_t{expert} * experts; }
  double load(int expert) const;
  double load_of_node(int expert) const { return load(expert) / nodes; }
};

// A token uses experts of its own node, else of any node. An expert on a single node leads tokens
// there. Experts are in sets by that node; the number of experts of a token in a set has a known
// mean and variance, and a Polya urn with both gives the share of tokens with none. A token of an
// expert on several nodes goes to one that it needs anyway, if there is one.
class Crossings {
 public:
  explicit Crossings(const Pairs& pairs);

  bool hosts(int node, int expert) const { return hosts_QE_[at(node, expert)] != 0; }

  // Takes an expert from a node and gives it to another; kNowhere is none.
  static constexpr int kNowhere = -1;
  void move(int expert, int from, int to);

  // Rows of a token to other nodes than its own.
  double rows() const;

  // Pairs of a token and an expert that a node computes: tokens of nodes without the expert are shared
  // evenly by all that have it.
  double node_load(int node) const { return load_Q_[node]; }

 private:
  // Experts that lead tokens to one node.
  struct Set {
    double load = 0, square = 0;
    std::vector<char> has_E;
    std::vector<double> together_E;
  };

  int64_t at(int node, int expert) const { return int64_t{node} * pairs_.experts + expert; }
  void update(int node, int expert);
  void add_load(int expert, double sign);
  double visits(int node) const;
  double missed(int node, int expert) const;
  double rows_with_choice(int expert) const;

  const Pairs& pairs_;
  double tokens_ = 0, tokens_of_node_ = 0, tokens_of_nodes_ = 0;
  std::vector<double> load_E_, load_Q_;
  std::vector<char> hosts_QE_;
  std::vector<int> hosts_E_;
  std::vector<Set> sets_Q_;
};

}  // namespace laer
