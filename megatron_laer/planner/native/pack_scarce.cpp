// The loop over ranks, by the phases of pack_scarce.hpp.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "pack_scarce.hpp"

#include <algorithm>
#include <vector>

#include "open_items.hpp"
#include "window.hpp"

namespace laer {
namespace {

class ScarcePacking {
 public:
  ScarcePacking(const Shape& shape, const int64_t* node_counts_QE, int64_t cap,
                const PackingWeights& weights, RankContents& contents)
      : shape_(shape),
        cap_(cap),
        num_whole_(shape.capacity - 1),
        open_(shape, node_counts_QE),  // phase 1
        search_(shape.capacity, cap, weights),
        contents_(contents) {}

  // Phase 2.
  void run() {
    int64_t open_ranks = shape_.ranks;
    for (int local_rank = 0; local_rank < shape_.node_size; ++local_rank) {
      for (int node = 0; node < shape_.nodes(); ++node) {
        if (open_.size() == 0) return;
        fill(node, node * shape_.node_size + local_rank, open_ranks);
        --open_ranks;
      }
    }
  }

 private:
  void fill(int node, int rank, int64_t open_ranks) {
    // Phase 2a.
    const RankBounds bounds{
        std::max<int64_t>(open_.tokens() - (open_ranks - 1) * cap_, 0),
        std::min<int64_t>(num_whole_, open_ranks * num_whole_ + 1 - open_.size())};
    // Phase 2b.
    open_.of_node(node, items_);
    const RankChoice& choice = search_.cheapest(items_, open_.mixed_tokens_E(node), bounds);
    if (choice.cost != RankChoice::kNone) return take(node, rank, choice);
    // Phase 2c.
    open_.all(items_);
    return take(node, rank, window_choice(open_ranks));
  }

  RankChoice window_choice(int64_t open_ranks) const {
    const Window window = find_window(items_, num_whole_, open_ranks, cap_);
    RankChoice choice;
    for (int i = window.first; i < window.split_item; ++i) choice.whole_items.push_back(i);
    choice.split_item = window.split_item;
    choice.split_tokens = std::min(items_[window.split_item].tokens, cap_ - window.whole_tokens);
    return choice;
  }

  // Phase 2d.
  void take(int node, int rank, const RankChoice& choice) {
    for (int i : choice.whole_items) {
      open_.take(node, items_[i], items_[i].tokens);
      contents_.add(rank, items_[i].expert);
    }
    const Item& split = items_[choice.split_item];
    contents_.add(rank, split.expert);
    open_.take(node, split, choice.split_tokens);
  }

  const Shape& shape_;
  const int64_t cap_;
  const int num_whole_;
  OpenItems open_;
  RankChoiceSearch search_;
  RankContents& contents_;
  std::vector<Item> items_;  // what the rank at hand chooses from
};

}  // namespace

void pack_scarce(const Shape& shape, const int64_t* node_counts_QE, int64_t cap,
                 const PackingWeights& weights, RankContents& contents) {
  ScarcePacking(shape, node_counts_QE, cap, weights, contents).run();
}

}  // namespace laer
