#include "settle.hpp"

#include <algorithm>

namespace laer {
namespace {

struct Match {
  int to, from;
};

// Experts of `held` keep the slots that they have in `before`; the rest fill up in order.
void keep_slots(int capacity, const int16_t* before, const int16_t* held, std::vector<char>& placed,
                std::vector<char>& taken, int16_t* out) {
  placed.assign(capacity, 0);
  taken.assign(capacity, 0);
  for (int slot = 0; slot < capacity; ++slot) {
    for (int i = 0; i < capacity; ++i) {
      if (placed[i] || held[i] != before[slot]) continue;
      out[slot] = held[i];
      placed[i] = taken[slot] = 1;
      break;
    }
  }
  int slot = 0;
  for (int i = 0; i < capacity; ++i) {
    if (placed[i]) continue;
    while (taken[slot]) ++slot;
    out[slot] = held[i];
    taken[slot] = 1;
  }
}

}  // namespace

void settle(const Shape& shape, const int16_t* current_S, std::vector<int16_t>& slots_S) {
  const int capacity = shape.capacity, size = shape.node_size;
  std::vector<int16_t> settled_S(slots_S.size());
  // Ranks of the node whose new experts include a given one, as lists over one array.
  std::vector<int> head_E(shape.experts, -1), next(static_cast<size_t>(size) * capacity);
  std::vector<int> shared(size), source(size);
  std::vector<char> gone(size), placed, taken;
  // By how many experts a rank's new slots share with its old ones; in a bucket in order.
  std::vector<std::vector<Match>> matches(capacity + 1);
  for (int node = 0; node < shape.nodes(); ++node) {
    const size_t first = static_cast<size_t>(node) * size * capacity;
    const int16_t* fresh = slots_S.data() + first;
    const int16_t* before = current_S + first;
    for (int at = size * capacity - 1; at >= 0; --at) {
      next[at] = head_E[fresh[at]];
      head_E[fresh[at]] = at;
    }
    for (auto& bucket : matches) bucket.clear();
    for (int to = 0; to < size; ++to) {
      std::fill(shared.begin(), shared.end(), 0);
      for (int slot = 0; slot < capacity; ++slot) {
        for (int at = head_E[before[to * capacity + slot]]; at >= 0; at = next[at]) {
          ++shared[at / capacity];
        }
      }
      for (int from = 0; from < size; ++from) {
        // Two slots with one expert on a rank could share more than there are slots.
        if (shared[from] > 0) matches[std::min(shared[from], capacity)].push_back({to, from});
      }
    }
    for (int at = 0; at < size * capacity; ++at) head_E[fresh[at]] = -1;
    std::fill(source.begin(), source.end(), -1);
    std::fill(gone.begin(), gone.end(), 0);
    for (int most = capacity; most > 0; --most) {
      for (const Match& match : matches[most]) {
        if (source[match.to] >= 0 || gone[match.from]) continue;
        source[match.to] = match.from;
        gone[match.from] = 1;
      }
    }
    int left = 0;
    for (int to = 0; to < size; ++to) {
      if (source[to] < 0) {
        while (gone[left]) ++left;
        source[to] = left;
        gone[left] = 1;
      }
      keep_slots(capacity, before + to * capacity, fresh + source[to] * capacity,
                 placed, taken, settled_S.data() + first + static_cast<size_t>(to) * capacity);
    }
  }
  slots_S = std::move(settled_S);
}

}  // namespace laer
