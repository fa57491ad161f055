// The experts that each rank hosts while a layout is made, at most C different ones per rank. It
// does not know how many of their tokens a rank computes: exact quotas decide that afterwards.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "shape.hpp"

namespace laer {

class RankContents {
 public:
  explicit RankContents(const Shape& shape)
      : shape_(shape), experts_S_(shape.slots()), used_N_(shape.ranks, 0) {}

  // No slot is used where the rank hosts the expert already.
  void add(int rank, int expert) {
    int16_t* experts_C = experts_S_.data() + static_cast<int64_t>(rank) * shape_.capacity;
    int16_t* end = experts_C + used_N_[rank];
    if (std::find(experts_C, end, expert) != end) return;
    experts_C[used_N_[rank]++] = static_cast<int16_t>(expert);
  }

  // The layout, experts of a rank ascending. Free slots get the node's largest experts that the
  // rank does not host yet.
  std::vector<int16_t> finish(const int64_t* node_counts_QE) {
    std::vector<int> order(shape_.experts);
    int sorted_node = -1;
    for (int rank = 0; rank < shape_.ranks; ++rank) {
      const int node = rank / shape_.node_size;
      if (used_N_[rank] < shape_.capacity && node != sorted_node) {
        const int64_t* counts_E = node_counts_QE + static_cast<int64_t>(node) * shape_.experts;
        const int needed = std::min(shape_.experts, 2 * shape_.capacity);
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + needed, order.end(), [&](int a, int b) {
          return counts_E[a] != counts_E[b] ? counts_E[a] > counts_E[b] : a < b;
        });
        sorted_node = node;
      }
      for (size_t i = 0; used_N_[rank] < shape_.capacity; ++i) add(rank, order[i]);
      int16_t* experts_C = experts_S_.data() + static_cast<int64_t>(rank) * shape_.capacity;
      std::sort(experts_C, experts_C + shape_.capacity);
    }
    return experts_S_;
  }

 private:
  Shape shape_;
  std::vector<int16_t> experts_S_;
  std::vector<int> used_N_;
};

}  // namespace laer
