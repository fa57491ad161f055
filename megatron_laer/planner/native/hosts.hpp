// What ranks host while a layout is made, and the window argument that both constructions use.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "quotas.hpp"

namespace laer {

// What each rank hosts so far, at most C different experts.
class Hosts {
 public:
  explicit Hosts(const Shape& shape) : shape_(shape), held_(shape.slots()), used_(shape.ranks, 0) {}

  void add(int rank, int expert) {
    int16_t* held = held_.data() + static_cast<int64_t>(rank) * shape_.capacity;
    if (std::find(held, held + used_[rank], expert) != held + used_[rank]) return;
    held[used_[rank]++] = static_cast<int16_t>(expert);
  }

  // Free slots get the node's largest experts that the rank does not host yet.
  std::vector<int16_t> finish(const int64_t* node_counts_QE) {
    std::vector<int> order(shape_.experts);
    int sorted_node = -1;
    for (int rank = 0; rank < shape_.ranks; ++rank) {
      const int node = rank / shape_.node_size;
      if (used_[rank] < shape_.capacity && node != sorted_node) {
        const int64_t* counts_E = node_counts_QE + static_cast<int64_t>(node) * shape_.experts;
        const int needed = std::min(shape_.experts, 2 * shape_.capacity);
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + needed, order.end(), [&](int a, int b) {
          return counts_E[a] != counts_E[b] ? counts_E[a] > counts_E[b] : a < b;
        });
        sorted_node = node;
      }
      for (size_t i = 0; used_[rank] < shape_.capacity; ++i) add(rank, order[i]);
      int16_t* held = held_.data() + static_cast<int64_t>(rank) * shape_.capacity;
      std::sort(held, held + shape_.capacity);
    }
    return held_;
  }

 private:
  Shape shape_;
  std::vector<int16_t> held_;
  std::vector<int> used_;
};

// Neighbours in ascending order that a rank takes whole, and the next one, which fills it up.
struct Window {
  int first, filling;
  int64_t sum;  // without the filling
};

// Slides upwards until the filling reaches the cap. Items missing to the number that the argument
// speaks of count as empty ones in front, so the window may hold fewer than `whole`.
template <typename Items>
Window find_window(const Items& items, int whole, int64_t open_ranks, int64_t cap) {
  const int open = static_cast<int>(items.size());
  const int64_t missing = std::max<int64_t>(open_ranks * whole + 1 - open, 0);
  int first = -static_cast<int>(std::min<int64_t>(missing, whole));
  int64_t sum = 0;
  auto rest = [&](int i) { return i < 0 ? 0 : items[i].rest; };
  for (int i = 0; i < std::min(first + whole, open - 1); ++i) sum += items[i].rest;
  while (first + whole + 1 < open && sum - rest(first) + rest(first + whole) <= cap) {
    sum += rest(first + whole) - rest(first);
    ++first;
  }
  return {std::max(first, 0), std::min(first + whole, open - 1), sum};
}

}  // namespace laer
