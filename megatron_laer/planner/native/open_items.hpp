// The items that packing over all ranks has not given to a rank yet: their bookkeeping by node. It
// does not choose among them, see rank_choice.hpp; items themselves are explained in window.hpp.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <vector>

#include "shape.hpp"
#include "window.hpp"

namespace laer {

// An expert has one mixed item at most, with tokens of several nodes, and home items beside it,
// with tokens of one node each. All lists are ascending.
class OpenItems {
 public:
  // All tokens of an expert are its mixed item, but for the largest shares of nodes, which become
  // home items: as many as the window argument admits items beyond E.
  OpenItems(const Shape& shape, const int64_t* node_counts_QE);

  int64_t size() const { return size_; }
  int64_t tokens() const { return tokens_; }

  // What ranks of a node choose from: its home items and all mixed ones.
  void of_node(int node, std::vector<Item>& items) const { merge(home_items_Q_[node], items); }
  void all(std::vector<Item>& items);

  // Tokens of the node in the mixed items of all experts, [E].
  const int64_t* mixed_tokens_E(int node) const { return mixed_tokens_QE_.data() + at(node, 0); }

  // Gives `amount` tokens of an item to a rank of the node, its own ones first, and closes the item
  // if none are left.
  void take(int node, Item item, int64_t amount);

 private:
  size_t at(int node, int expert) const {
    return static_cast<size_t>(node) * shape_.experts + expert;
  }
  // Tokens in an expert's mixed item, or more than are left, of a node.
  struct Share {
    int64_t tokens;
    int node;
  };

  int64_t& most_tokens(int expert);
  void split_ahead(const int64_t* node_counts_QE, int64_t num_splits);
  void merge(const std::vector<Item>& home_items, std::vector<Item>& items) const;
  void open(const Item& item);
  void close(const Item& item);

  const Shape& shape_;
  std::vector<int64_t> mixed_tokens_QE_;
  std::vector<std::vector<Share>> shares_E_;  // heaps, made when first asked for
  std::vector<std::vector<Item>> home_items_Q_;
  std::vector<Item> mixed_items_;
  // Home items of all nodes are rarely asked for: as they were then, and what has changed since.
  std::vector<Item> all_home_items_, opened_, closed_;
  int64_t size_ = 0, tokens_ = 0;
};

}  // namespace laer
