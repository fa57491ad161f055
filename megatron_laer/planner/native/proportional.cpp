// Two phases: how many replicas each expert has, and which rank takes each of them. The plain
// double of both is planner/reference_exact.py.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "proportional.hpp"

#include <algorithm>
#include <numeric>

#include "home.hpp"
#include "node_shares.hpp"

namespace laer {
namespace {

// Of the ranks of a node that are about equally loaded, so many are compared.
constexpr int kCompared = 8;

// A forecast counts every expert as having a quarter of the mean load more than it has, so that
// one that grows out of nothing finds some replicas. Chosen as docs/internals/planner.md says.
constexpr int64_t kPriorParts = 4;

// Load per replica; whole tokens decide nearly always, the exact fraction where they do not.
struct Ratio {
  int64_t load;
  int64_t replicas;
  int64_t whole;

  Ratio(int64_t load, int64_t replicas) : load(load), replicas(replicas), whole(load / replicas) {}

  friend bool operator<(const Ratio& a, const Ratio& b) {
    if (a.whole != b.whole) return a.whole < b.whole;
    return static_cast<__int128>(a.load) * b.replicas < static_cast<__int128>(b.load) * a.replicas;
  }
};

void add_prior(std::vector<int64_t>& loads) {
  if (loads.empty()) return;  // of a node that hosts no expert
  const int64_t total = std::accumulate(loads.begin(), loads.end(), int64_t{0});
  const int64_t prior = total / (kPriorParts * static_cast<int64_t>(loads.size()));
  for (int64_t& load : loads) load += prior;
}

// Slots go one after the other to the expert with most load per replica, up to `most` replicas
// each.
std::vector<int> count_replicas(const std::vector<int64_t>& loads, int slots, int most) {
  const int experts = static_cast<int>(loads.size());
  std::vector<int> replicas(experts, 1);
  if (most == 1) return replicas;
  const int64_t total = std::accumulate(loads.begin(), loads.end(), int64_t{0});
  int64_t spare = slots - experts;
  // An expert has a replica after the r-th if load / r is above the level at which slots run out.
  // That level is at most total / spare, so these are safe, and few are left for the heap.
  if (total > 0) {
    const int64_t offered = spare;
    for (int e = 0; e < experts; ++e) {
      const __int128 share = static_cast<__int128>(loads[e]) * offered;
      const auto above = static_cast<int64_t>(share == 0 ? 0 : (share - 1) / total);
      const auto more = static_cast<int>(std::min<int64_t>(above, most - 1));
      replicas[e] += more;
      spare -= more;
    }
  }
  struct Item {
    Ratio ratio;
    int expert;
  };
  auto cooler = [](const Item& a, const Item& b) {
    if (a.ratio < b.ratio) return true;
    if (b.ratio < a.ratio) return false;
    if (a.ratio.replicas != b.ratio.replicas) return a.ratio.replicas > b.ratio.replicas;
    return a.expert > b.expert;
  };
  std::vector<Item> heap;
  for (int e = 0; e < experts; ++e) {
    if (replicas[e] < most) heap.push_back({Ratio(loads[e], replicas[e]), e});
  }
  std::make_heap(heap.begin(), heap.end(), cooler);
  for (; spare > 0 && !heap.empty(); --spare) {
    std::pop_heap(heap.begin(), heap.end(), cooler);
    const int e = heap.back().expert;
    heap.pop_back();
    if (++replicas[e] == most) continue;
    heap.push_back({Ratio(loads[e], replicas[e]), e});
    std::push_heap(heap.begin(), heap.end(), cooler);
  }
  return replicas;
}

// Ranks that are linked by experts they share, directly or over others.
class Components {
 public:
  explicit Components(int size) : parent_(size) { std::iota(parent_.begin(), parent_.end(), 0); }

  int find(int rank) {
    while (parent_[rank] != rank) {
      parent_[rank] = parent_[parent_[rank]];
      rank = parent_[rank];
    }
    return rank;
  }

  void join(int a, int b) { parent_[find(a)] = find(b); }

 private:
  std::vector<int> parent_;
};

// The ranks of one part of the machine, filled expert by expert.
class Placement {
 public:
  Placement(const Shape& shape, int first_rank, int ranks)
      : shape_(shape),
        first_node_(first_rank / shape.node_size),
        ranks_(ranks),
        load_(ranks, 0),
        used_(ranks, 0),
        slots_(static_cast<size_t>(ranks) * shape.capacity),
        components_(ranks),
        beside_E_(shape.experts, -1),
        open_(ranks / shape.node_size) {
    for (int rank = 0; rank < ranks; ++rank) open_[rank / shape.node_size].push_back(rank);
  }

  // Loads and replicas of these ranks' experts; shares by node steer replicas towards their tokens.
  void place(const std::vector<int64_t>& loads, const std::vector<int>& replicas,
             const int64_t* node_counts_QE) {
    const int experts = shape_.experts;
    std::vector<Ratio> ratios;
    // Experts without a replica here have no load here either.
    for (int e = 0; e < experts; ++e) ratios.emplace_back(loads[e], std::max(replicas[e], 1));
    std::vector<int> order(experts);
    std::iota(order.begin(), order.end(), 0);
    const auto none = std::stable_partition(order.begin(), order.end(),
                                            [&](int e) { return replicas[e] > 0; });
    std::sort(order.begin(), none, [&](int a, int b) {
      if (ratios[b] < ratios[a]) return true;
      if (ratios[a] < ratios[b]) return false;
      return a < b;
    });
    for (int e : order) {
      find_nodes(e, node_counts_QE);
      int before = -1;
      for (int i = 0; i < replicas[e] && !nodes_.empty(); ++i) {
        before = add_replica(e, ratios[e].whole, before);
      }
    }
    // Slots whose replica would have been a second one on its rank take the heaviest other expert.
    for (int rank = 0; rank < ranks_; ++rank) {
      for (size_t i = 0; used_[rank] < shape_.capacity; ++i) {
        if (!holds(rank, order[i])) hold(rank, order[i]);
      }
    }
  }

  void copy_to(std::vector<int16_t>& slots_S) {
    const size_t first = static_cast<size_t>(first_node_) * shape_.node_size * shape_.capacity;
    for (int rank = 0; rank < ranks_; ++rank) {
      int16_t* held = slots_.data() + static_cast<size_t>(rank) * shape_.capacity;
      std::sort(held, held + shape_.capacity);
    }
    std::copy(slots_.begin(), slots_.end(), slots_S.begin() + first);
  }

 private:
  // A node where the expert at hand can still go.
  struct Node {
    int64_t unserved;  // its tokens that no replica serves yet
    int64_t least;     // least load of a rank that can take it
    int node;
  };

  // Of two nodes, the one to serve later.
  static bool later(const Node& a, const Node& b) {
    if (a.unserved != b.unserved) return a.unserved < b.unserved;
    return a.least != b.least ? a.least > b.least : a.node > b.node;
  }

  void find_nodes(int expert, const int64_t* node_counts_QE) {
    nodes_.clear();
    for (int node = 0; node < static_cast<int>(open_.size()); ++node) {
      if (open_[node].empty()) continue;
      const int64_t at = static_cast<int64_t>(first_node_ + node) * shape_.experts + expert;
      nodes_.push_back({node_counts_QE[at], load_[open_[node][0]], node});
    }
    std::make_heap(nodes_.begin(), nodes_.end(), later);
  }

  // Returns the rank that takes the replica; `before` is the last one's, or -1.
  int add_replica(int expert, int64_t share, int before) {
    std::pop_heap(nodes_.begin(), nodes_.end(), later);
    const Node to = nodes_.back();
    nodes_.pop_back();
    std::vector<int>& open = open_[to.node];
    const size_t at = pick(open, expert, share, before);
    const int rank = open[at];
    open.erase(open.begin() + at);
    load_[rank] += share;
    for (int i = 0; i < used_[rank]; ++i) beside_E_[held(rank)[i]] = expert;
    hold(rank, expert);
    if (before >= 0) components_.join(before, rank);
    if (used_[rank] < shape_.capacity) {
      open.insert(std::lower_bound(open.begin(), open.end(), rank,
                                   [&](int a, int b) { return less_loaded(a, b); }),
                  rank);
    }
    for (int other : open) {
      if (holds(other, expert)) continue;
      nodes_.push_back({to.unserved - share, load_[other], to.node});
      std::push_heap(nodes_.begin(), nodes_.end(), later);
      break;
    }
    return rank;
  }

  // Position of the rank to take: load can flow between ranks that share an expert, so of ranks
  // about as loaded as the least, one that nothing links to the expert's other ranks yet, else the
  // one that shares fewest experts with them.
  size_t pick(const std::vector<int>& open, int expert, int64_t share, int before) {
    size_t best = open.size();
    int best_links = 0, compared = 0;
    int64_t most = 0;
    for (size_t at = 0; at < open.size() && compared < kCompared; ++at) {
      const int rank = open[at];
      if (holds(rank, expert)) continue;
      if (compared == 0) most = load_[rank] + share / 2;
      if (load_[rank] > most) break;
      const int links = before < 0 ? 0 : links_to(rank, expert, before);
      if (compared == 0 || links < best_links) {
        best = at;
        best_links = links;
      }
      if (best_links == 0) break;
      ++compared;
    }
    return best;
  }

  int links_to(int rank, int expert, int before) {
    if (components_.find(rank) != components_.find(before)) return 0;
    int links = 1;
    for (int i = 0; i < used_[rank]; ++i) links += beside_E_[held(rank)[i]] == expert;
    return links;
  }

  bool less_loaded(int a, int b) const {
    return load_[a] != load_[b] ? load_[a] < load_[b] : a < b;
  }

  int16_t* held(int rank) { return slots_.data() + static_cast<size_t>(rank) * shape_.capacity; }

  bool holds(int rank, int expert) {
    return std::find(held(rank), held(rank) + used_[rank], expert) != held(rank) + used_[rank];
  }

  void hold(int rank, int expert) { held(rank)[used_[rank]++] = static_cast<int16_t>(expert); }

  const Shape& shape_;
  const int first_node_, ranks_;
  std::vector<int64_t> load_;
  std::vector<int> used_;
  std::vector<int16_t> slots_;
  Components components_;
  std::vector<int> beside_E_;           // the last expert placed on a rank with this one
  std::vector<std::vector<int>> open_;  // ranks with a free slot by node, ascending by load
  std::vector<Node> nodes_;             // heap of nodes for the expert at hand
};

}  // namespace

std::vector<int16_t> proportional(const Shape& shape, const Sums& sums, Purpose purpose) {
  const int64_t* node_counts_QE = sums.node_counts_QE.data();
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
    if (purpose == Purpose::kForecast) add_prior(loads);
    Placement placement(shape, part * ranks, ranks);
    placement.place(loads, count_replicas(loads, ranks * shape.capacity, ranks), node_counts_QE);
    placement.copy_to(slots_S);
  }
  return slots_S;
}

std::vector<int16_t> proportional_by_node(const Shape& shape, const Sums& sums, int most_experts) {
  const int64_t* node_counts_QE = sums.node_counts_QE.data();
  const int64_t cap = ideal_load(shape, sums);
  const NodeShares shares = share_among_nodes(shape, node_counts_QE, cap, most_experts);
  std::vector<int16_t> slots_S(shape.slots());
  for (int node = 0; node < shape.nodes(); ++node) {
    const size_t first = static_cast<size_t>(node) * shape.experts;
    std::vector<int> hosted;
    std::vector<int64_t> hosted_loads;
    for (int e = 0; e < shape.experts; ++e) {
      if (!shares.hosted_QE[first + e]) continue;
      hosted.push_back(e);
      hosted_loads.push_back(shares.tokens_QE[first + e]);
    }
    add_prior(hosted_loads);
    const std::vector<int> hosted_replicas =
        count_replicas(hosted_loads, shape.node_size * shape.capacity, shape.node_size);
    std::vector<int64_t> loads(shape.experts, 0);
    std::vector<int> replicas(shape.experts, 0);
    for (size_t i = 0; i < hosted.size(); ++i) {
      loads[hosted[i]] = hosted_loads[i];
      replicas[hosted[i]] = hosted_replicas[i];
    }
    Placement placement(shape, node * shape.node_size, shape.node_size);
    placement.place(loads, replicas, node_counts_QE);
    placement.copy_to(slots_S);
  }
  return slots_S;
}

}  // namespace laer
