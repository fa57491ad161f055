#include "proportional.hpp"

#include <algorithm>
#include <numeric>
#include <queue>

namespace laer {
namespace {

// a / b < c / d for non-negative integers.
bool less_ratio(int64_t a, int64_t b, int64_t c, int64_t d) {
  return static_cast<__int128>(a) * d < static_cast<__int128>(c) * b;
}

// One more replica, again and again, for the expert with most load per replica.
std::vector<int> count_replicas(const std::vector<int64_t>& loads, int slots, int most) {
  const int experts = static_cast<int>(loads.size());
  std::vector<int> replicas(experts, 1);
  auto cooler = [&](int a, int b) {
    if (less_ratio(loads[a], replicas[a], loads[b], replicas[b])) return true;
    if (less_ratio(loads[b], replicas[b], loads[a], replicas[a])) return false;
    return replicas[a] != replicas[b] ? replicas[a] > replicas[b] : a > b;
  };
  std::vector<int> heap;
  for (int e = 0; e < experts && most > 1; ++e) heap.push_back(e);
  std::make_heap(heap.begin(), heap.end(), cooler);
  for (int spare = slots - experts; spare > 0 && !heap.empty(); --spare) {
    std::pop_heap(heap.begin(), heap.end(), cooler);
    if (++replicas[heap.back()] < most) {
      std::push_heap(heap.begin(), heap.end(), cooler);
    } else {
      heap.pop_back();
    }
  }
  return replicas;
}

class Placement {
 public:
  Placement(const Shape& shape, int first_rank, int ranks)
      : shape_(shape),
        first_rank_(first_rank),
        ranks_(ranks),
        load_(ranks, 0),
        used_(ranks, 0),
        slots_(static_cast<size_t>(ranks) * shape.capacity) {}

  // Loads and replicas of these ranks' experts; shares by node steer replicas towards their tokens.
  void place(const std::vector<int64_t>& loads, const std::vector<int>& replicas,
             const int64_t* node_counts_QE) {
    const int experts = static_cast<int>(loads.size());
    std::vector<int> order(experts);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int a, int b) {
      if (less_ratio(loads[b], replicas[b], loads[a], replicas[a])) return true;
      if (less_ratio(loads[a], replicas[a], loads[b], replicas[b])) return false;
      return a < b;
    });
    const int nodes = ranks_ / shape_.node_size;
    std::vector<int64_t> unserved(nodes);
    for (int e : order) {
      const int64_t share = loads[e] / replicas[e];
      for (int node = 0; node < nodes; ++node) {
        const int64_t at = first_rank_ / shape_.node_size + node;
        unserved[node] = node_counts_QE[at * shape_.experts + e];
      }
      for (int i = 0; i < replicas[e]; ++i) {
        const int rank = pick(e, unserved);
        if (rank < 0) break;
        add(rank, e, share);
        unserved[rank / shape_.node_size] -= share;
      }
    }
    // Slots whose replica would have been a second one on its rank take the heaviest other expert.
    for (int rank = 0; rank < ranks_; ++rank) {
      for (size_t i = 0; used_[rank] < shape_.capacity; ++i) {
        if (!holds(rank, order[i])) add(rank, order[i], 0);
      }
    }
  }

  void copy_to(std::vector<int16_t>& slots_S) {
    for (int rank = 0; rank < ranks_; ++rank) {
      int16_t* held = slots_.data() + static_cast<size_t>(rank) * shape_.capacity;
      std::sort(held, held + shape_.capacity);
      std::copy(held, held + shape_.capacity,
                slots_S.begin() + static_cast<size_t>(first_rank_ + rank) * shape_.capacity);
    }
  }

 private:
  bool holds(int rank, int expert) const {
    const int16_t* held = slots_.data() + static_cast<size_t>(rank) * shape_.capacity;
    return std::find(held, held + used_[rank], expert) != held + used_[rank];
  }

  void add(int rank, int expert, int64_t share) {
    load_[rank] += share;
    slots_[static_cast<size_t>(rank) * shape_.capacity + used_[rank]++] =
        static_cast<int16_t>(expert);
  }

  // The least loaded rank without the expert, in the node with most tokens that no replica serves;
  // -1 where every rank with a free slot has the expert already.
  int pick(int expert, const std::vector<int64_t>& unserved) const {
    int best = -1;
    for (int rank = 0; rank < ranks_; ++rank) {
      if (used_[rank] == shape_.capacity || holds(rank, expert)) continue;
      if (best >= 0) {
        const int64_t here = unserved[rank / shape_.node_size];
        const int64_t there = unserved[best / shape_.node_size];
        if (here < there || (here == there && load_[rank] >= load_[best])) continue;
      }
      best = rank;
    }
    return best;
  }

  const Shape& shape_;
  const int first_rank_, ranks_;
  std::vector<int64_t> load_;
  std::vector<int> used_;
  std::vector<int16_t> slots_;
};

}  // namespace

std::vector<int16_t> proportional(const Shape& shape, const int64_t* node_counts_QE) {
  std::vector<int16_t> slots_S(shape.slots());
  const bool by_node = shape.experts <= shape.node_size * (shape.capacity - 1);
  const int parts = by_node ? shape.nodes() : 1;
  const int ranks = shape.ranks / parts;
  std::vector<int64_t> loads(shape.experts);
  for (int part = 0; part < parts; ++part) {
    std::fill(loads.begin(), loads.end(), 0);
    for (int node = part * (ranks / shape.node_size); node < (part + 1) * (ranks / shape.node_size);
         ++node) {
      const int64_t* counts_E = node_counts_QE + static_cast<int64_t>(node) * shape.experts;
      for (int e = 0; e < shape.experts; ++e) loads[e] += counts_E[e];
    }
    Placement placement(shape, part * ranks, ranks);
    placement.place(loads, count_replicas(loads, ranks * shape.capacity, ranks), node_counts_QE);
    placement.copy_to(slots_S);
  }
  return slots_S;
}

}  // namespace laer
