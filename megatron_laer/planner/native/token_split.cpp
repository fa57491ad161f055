// The second half of the exact quotas: which source sends how many tokens to which slot, for loads
// of slots that are known (slot_loads.cpp). One rank's row or columns need no N*S matrix, as each
// expert's tokens are intervals that are matched where they overlap. Of a node's tokens that stay in
// it every source has the same share, so that sources send alike to other nodes.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include <algorithm>
#include <numeric>

#include "quotas.hpp"
#include "replicas.hpp"

namespace laer {
namespace {

struct Interval {
  int64_t begin, end;

  int64_t size() const { return std::max<int64_t>(end - begin, 0); }
  Interval within(int64_t low, int64_t high) const {
    return {std::max(begin, low), std::min(end, high)};
  }
};

int64_t overlap(const Interval& a, const Interval& b) {
  return std::max<int64_t>(std::min(a.end, b.end) - std::max(a.begin, b.begin), 0);
}

// Of `tokens` shared by `whole`, those of the first `part`, rounded down.
int64_t shared_of(int64_t tokens, int64_t part, int64_t whole) {
  if ((tokens | part) < int64_t{1} << 31) return tokens * part / whole;
  return static_cast<int64_t>(static_cast<__int128>(tokens) * part / whole);
}

// One expert's tokens as intervals. Own tokens first; what is left of sources and replicas in a
// node are two rows of intervals that are matched where they overlap; what lies beyond is matched
// the same way over all nodes.
class ExpertSplit {
 public:
  ExpertSplit(const Shape& shape, const Counts& counts, const int64_t* loads_S,
              const Replicas& replicas, int expert)
      : shape_(shape),
        counts_(counts),
        loads_S_(loads_S),
        replicas_(replicas),
        expert_(expert) {}

  int begin() const { return replicas_.begin_E[expert_]; }
  bool is_alone() const { return replicas_.begin_E[expert_ + 1] == begin() + 1; }
  int slot(int replica) const { return replicas_.slot[replica]; }
  int rank(int replica) const { return replicas_.rank[replica]; }
  int64_t load(int replica) const { return loads_S_[slot(replica)]; }
  int64_t count(int rank) const { return counts_(rank, expert_); }
  int64_t own(int replica) const { return std::min(count(rank(replica)), load(replica)); }

  // Calls visit(node, first replica, end replica) for every node, in order.
  template <typename Visit>
  void for_nodes(Visit visit) const {
    int replica = begin();
    for (int node = 0; node < shape_.nodes(); ++node) {
      const int first = replica;
      replica = replicas_.end_in(node, expert_, first);
      visit(node, first, replica);
    }
  }

  struct Node {
    int64_t near;        // tokens matched inside the node, own ones not counted
    int64_t far_supply;  // tokens that must leave
    int64_t far_demand;  // tokens that must come

    // Of the first tokens of the node's row, those that stay inside.
    int64_t staying(int64_t first) const {
      return far_supply == 0 ? first : shared_of(near, first, near + far_supply);
    }
    Interval inside(const Interval& source) const {
      return {staying(source.begin), staying(source.end)};
    }
    Interval leaving(const Interval& source, int64_t far_begin) const {
      const Interval stays = inside(source);
      return {far_begin + source.begin - stays.begin, far_begin + source.end - stays.end};
    }
    // The part of a replica's room that is for tokens of other nodes.
    Interval foreign(const Interval& room, int64_t demand_begin) const {
      return {demand_begin + std::max(room.begin, near) - near,
              demand_begin + std::max(room.end, near) - near};
    }
  };

  Node node(int node, int first, int last) const {
    int64_t own_tokens = 0, load_tokens = 0;
    for (int replica = first; replica < last; ++replica) {
      own_tokens += own(replica);
      load_tokens += load(replica);
    }
    const int64_t supply = counts_.of_node(node, expert_), stay = std::min(supply, load_tokens);
    return {stay - own_tokens, supply - stay, load_tokens - stay};
  }

  // The same for the nodes that have replicas.
  template <typename Visit>
  void for_hosts(Visit visit) const {
    replicas_.for_nodes(expert_, visit);
  }

  // Calls visit(rank, interval in the node's row) for the node's sources, own tokens taken off.
  template <typename Visit>
  void for_sources(int node, int first, int last, Visit visit) const {
    int64_t at = 0;
    for (int source = node * shape_.node_size; source < (node + 1) * shape_.node_size; ++source) {
      int64_t left = count(source);
      if (first < last && rank(first) == source) left -= own(first++);
      visit(source, Interval{at, at + left});
      at += left;
    }
  }

  template <typename Visit>
  void for_targets(int first, int last, Visit visit) const {
    int64_t at = 0;
    for (int replica = first; replica < last; ++replica) {
      const int64_t left = load(replica) - own(replica);
      visit(replica, Interval{at, at + left});
      at += left;
    }
  }

 private:
  const Shape& shape_;
  const Counts& counts_;
  const int64_t* loads_S_;
  const Replicas& replicas_;
  int expert_;
};

}  // namespace

void rank_row(const Shape& shape, const Counts& counts, const Replicas& replicas,
              const int64_t* loads_S, int rank, int64_t* row_S) {
  std::fill(row_S, row_S + shape.slots(), 0);
  const int home = rank / shape.node_size;
  for (int e = 0; e < shape.experts; ++e) {
    const ExpertSplit split(shape, counts, loads_S, replicas, e);
    if (split.is_alone()) row_S[split.slot(split.begin())] = split.count(rank);
    if (split.is_alone() || split.count(rank) == 0) continue;
    int first = 0, last = 0;
    split.for_hosts([&](int node, int begin, int end) {
      if (node == home) first = begin, last = end;
    });
    const auto at_home = split.node(home, first, last);
    Interval mine{0, 0};
    split.for_sources(home, first, last, [&](int source, const Interval& interval) {
      if (source == rank) mine = interval;
    });
    const Interval near = at_home.inside(mine);
    split.for_targets(first, last, [&](int replica, const Interval& interval) {
      row_S[split.slot(replica)] = overlap(near, interval);
      if (split.rank(replica) == rank) row_S[split.slot(replica)] += split.own(replica);
    });
    if (mine.size() == near.size()) continue;
    int64_t far_begin = 0, demand_begin = 0;
    split.for_nodes([&](int node, int begin, int end) {
      if (node < home) far_begin += split.node(node, begin, end).far_supply;
    });
    const Interval far = at_home.leaving(mine, far_begin);
    split.for_hosts([&](int node, int begin, int end) {
      const auto sums = split.node(node, begin, end);
      if (sums.far_demand == 0) return;
      split.for_targets(begin, end, [&](int replica, const Interval& interval) {
        row_S[split.slot(replica)] += overlap(far, sums.foreign(interval, demand_begin));
      });
      demand_begin += sums.far_demand;
    });
  }
}

void rank_columns(const Shape& shape, const Counts& counts, const Replicas& replicas,
                  const int64_t* loads_S, int rank, int64_t* columns_NC) {
  std::fill(columns_NC, columns_NC + shape.slots(), 0);
  const int home = rank / shape.node_size;
  for (int c = 0; c < shape.capacity; ++c) {
    const int slot = rank * shape.capacity + c;
    if (loads_S[slot] == 0 || replicas.slots_S[slot] == kEmpty) continue;
    auto column = [&](int source) -> int64_t& { return columns_NC[source * shape.capacity + c]; };
    const ExpertSplit split(shape, counts, loads_S, replicas, replicas.slots_S[slot]);
    Interval far{0, 0};
    int64_t demand_begin = 0;
    split.for_nodes([&](int node, int first, int last) {
      const auto sums = split.node(node, first, last);
      if (node == home) {
        Interval mine{0, 0};
        split.for_targets(first, last, [&](int replica, const Interval& interval) {
          if (split.slot(replica) != slot) return;
          mine = interval;
          column(rank) = split.own(replica);
        });
        const Interval near = mine.within(0, sums.near);
        split.for_sources(node, first, last, [&](int source, const Interval& interval) {
          column(source) += overlap(near, sums.inside(interval));
        });
        far = sums.foreign(mine, demand_begin);
      }
      demand_begin += sums.far_demand;
    });
    if (far.size() == 0) continue;
    int64_t far_begin = 0;
    split.for_nodes([&](int node, int first, int last) {
      const auto sums = split.node(node, first, last);
      if (sums.far_supply == 0) return;
      const int64_t begin = far_begin;
      far_begin += sums.far_supply;
      if (overlap({begin, far_begin}, far) == 0) return;
      split.for_sources(node, first, last, [&](int source, const Interval& interval) {
        column(source) += overlap(sums.leaving(interval, begin), far);
      });
    });
  }
}

Totals totals(const Shape& shape, const Counts& counts, const Replicas& replicas,
              const int64_t* loads_S) {
  Totals sums;
  sums.near_S.assign(shape.slots(), 0);
  sums.far_S.assign(shape.slots(), 0);
  sums.sent_near_N.assign(shape.ranks, 0);
  sums.sent_far_N.assign(shape.ranks, 0);
  sums.own_N.assign(shape.ranks, 0);
  // What is sent far is the rest: most pairs of a node and an expert have no replica.
  for (int e = 0; e < shape.experts; ++e) {
    const ExpertSplit split(shape, counts, loads_S, replicas, e);
    split.for_hosts([&](int node, int first, int last) {
      const auto sums_of_node = split.node(node, first, last);
      for (int replica = first; replica < last; ++replica) {
        sums.own_N[split.rank(replica)] += split.own(replica);
        sums.near_S[split.slot(replica)] += split.own(replica);
      }
      split.for_targets(first, last, [&](int replica, const Interval& interval) {
        const int64_t near = interval.within(0, sums_of_node.near).size();
        sums.near_S[split.slot(replica)] += near;
        sums.far_S[split.slot(replica)] += interval.size() - near;
      });
      if (sums_of_node.near == 0) return;
      int64_t before = 0;
      split.for_sources(node, first, last, [&](int source, const Interval& interval) {
        const int64_t staying = sums_of_node.staying(interval.end);
        sums.sent_near_N[source] += staying - before;
        before = staying;
      });
    });
  }
  for (int rank = 0; rank < shape.ranks; ++rank) {
    sums.sent_near_N[rank] += sums.own_N[rank];
    sums.sent_far_N[rank] = counts.sum(rank) - sums.sent_near_N[rank];
  }
  return sums;
}

}  // namespace laer
