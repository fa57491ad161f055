// Greedy, by how many experts a rank's new slots share with its old ones: pairs of ranks of a node
// that share most first. It is not an assignment of least cost.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "match_previous.hpp"

#include <algorithm>

namespace laer {
namespace {

// Ranks of a node: `to` takes over what the new layout has on `from`.
struct Match {
  int to, from;
};

// Experts of a rank keep the slots that they have in `before`; the rest fill up in order. `placed`
// and `taken` are scratch space.
void keep_slots(int capacity, const int16_t* before, const int16_t* experts,
                std::vector<char>& placed, std::vector<char>& taken, int16_t* out) {
  placed.assign(capacity, 0);
  taken.assign(capacity, 0);
  for (int slot = 0; slot < capacity; ++slot) {
    for (int i = 0; i < capacity; ++i) {
      if (placed[i] || experts[i] != before[slot]) continue;
      out[slot] = experts[i];
      placed[i] = taken[slot] = 1;
      break;
    }
  }
  int slot = 0;
  for (int i = 0; i < capacity; ++i) {
    if (placed[i]) continue;
    while (taken[slot]) ++slot;
    out[slot] = experts[i];
    taken[slot] = 1;
  }
}

}  // namespace

void match_previous(const Shape& shape, const int16_t* current_S, std::vector<int16_t>& slots_S) {
  const int capacity = shape.capacity, size = shape.node_size;
  std::vector<int16_t> matched_S(slots_S.size());
  // Ranks of the node whose new experts include a given one, as lists over one array.
  std::vector<int> head_E(shape.experts, -1), next(static_cast<size_t>(size) * capacity);
  std::vector<int> shared(size), source(size);
  std::vector<char> is_gone(size), placed, taken;
  // By how many experts the two ranks share; in a bucket in order.
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
    std::fill(is_gone.begin(), is_gone.end(), 0);
    for (int most = capacity; most > 0; --most) {
      for (const Match& match : matches[most]) {
        if (source[match.to] >= 0 || is_gone[match.from]) continue;
        source[match.to] = match.from;
        is_gone[match.from] = 1;
      }
    }
    int left = 0;
    for (int to = 0; to < size; ++to) {
      if (source[to] < 0) {
        while (is_gone[left]) ++left;
        source[to] = left;
        is_gone[left] = 1;
      }
      keep_slots(capacity, before + to * capacity, fresh + source[to] * capacity, placed, taken,
                 matched_S.data() + first + static_cast<size_t>(to) * capacity);
    }
  }
  slots_S = std::move(matched_S);
}

}  // namespace laer
