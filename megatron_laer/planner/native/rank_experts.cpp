// 1. Each node's experts are dealt to its ranks, heaviest first. 2. Ranks of a node exchange
// experts until loads are even, and those of experts without another replica, which no split can
// move. 3. Slots change places or experts while drifted loads cannot be balanced.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, G ranks per node, X loads.
#include "rank_experts.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

#include "flow.hpp"
#include "replicas.hpp"

namespace laer {
namespace {

// Rows per token that an excess equal to the mean is worth, and an excess that no one notices.
constexpr double kExcessRows = 20, kFreeExcess = 0.003;

class Ranks {
 public:
  Ranks(const Shape& shape, const Pairs& pairs, const std::vector<std::vector<int64_t>>& loads_XE,
        Random& random, Crossings& crossings)
      : shape_(shape), pairs_(pairs), loads_XE_(loads_XE), random_(random), crossings_(crossings),
        slots_S_(shape.slots(), kEmpty), used_N_(shape.ranks, 0), load_N_(shape.ranks, 0),
        held_QE_(static_cast<size_t>(shape.nodes()) * shape.experts, 0) {}

  std::vector<int16_t> run(const NodeExperts& experts, int tries) {
    for (int node = 0; node < shape_.nodes(); ++node) {
      deal(node, experts.main_Q[node], shape_.home);
      deal(node, experts.replicas_Q[node], shape_.capacity);
      fill(node);
    }
    for (int node = 0; node < shape_.nodes(); ++node) level(node);
    repair(tries);
    return slots_S_;
  }

 private:
  int16_t& slot(int rank, int at) { return slots_S_[rank * shape_.capacity + at]; }
  int first_rank(int node) const { return node * shape_.node_size; }
  int& held(int node, int expert) {
    return held_QE_[static_cast<size_t>(node) * shape_.experts + expert];
  }
  double share(int node, int expert) const { return crossings_.load(node, expert); }

  bool has(int rank, int expert) {
    const auto first = slots_S_.begin() + rank * shape_.capacity;
    return std::find(first, first + shape_.capacity, expert) != first + shape_.capacity;
  }

  void put(int rank, int expert) {
    const int node = rank / shape_.node_size;
    slot(rank, used_N_[rank]++) = static_cast<int16_t>(expert);
    if (held(node, expert)++ == 0 && !crossings_.hosts(node, expert)) {
      crossings_.move(expert, Crossings::kNowhere, node);
    }
  }

  // Heaviest first, to the least loaded rank with room.
  void deal(int node, std::vector<int> experts, int most) {
    std::stable_sort(experts.begin(), experts.end(),
                     [&](int a, int b) { return share(node, a) > share(node, b); });
    for (int expert : experts) {
      int to = -1;
      for (int rank = first_rank(node); rank < first_rank(node + 1); ++rank) {
        if (used_N_[rank] < most && (to < 0 || load_N_[rank] < load_N_[to])) to = rank;
      }
      load_N_[to] += share(node, expert);
      put(to, expert);
    }
  }

  // A node may have every expert, and slots left: for the most chosen ones.
  void fill(int node) {
    std::vector<int> by_load_E(shape_.experts);
    std::iota(by_load_E.begin(), by_load_E.end(), 0);
    std::stable_sort(by_load_E.begin(), by_load_E.end(),
                     [&](int a, int b) { return pairs_.load(a) > pairs_.load(b); });
    for (int rank = first_rank(node); rank < first_rank(node + 1); ++rank) {
      for (int expert : by_load_E) {
        if (used_N_[rank] == shape_.capacity) break;
        if (!has(rank, expert)) put(rank, expert);
      }
    }
  }

  // Exchanges experts of two ranks while squares of both loads become fewer.
  void level(int node) {
    const int first = first_rank(node), last = first_rank(node + 1);
    std::vector<Load> share_E(shape_.experts), load_N(shape_.ranks);
    for (int e = 0; e < shape_.experts; ++e) {
      const double each = share(node, e) / std::max(held(node, e), 1);
      share_E[e] = {each, held(node, e) == 1 && crossings_.num_hosts(e) == 1 ? each : 0};
    }
    double mean = 0;
    for (int rank = first; rank < last; ++rank) {
      for (int at = 0; at < shape_.capacity; ++at) load_N[rank].add(share_E[slot(rank, at)], 1);
      mean += load_N[rank].all / shape_.node_size;
    }
    const double least = kFreeExcess * mean / 10 * mean;
    bool is_better = true;
    for (int round = 0; is_better && round < shape_.capacity * shape_.node_size; ++round) {
      is_better = false;
      for (int one = first; one < last; ++one) {
        for (int other = one + 1; other < last; ++other) {
          is_better |= exchange(one, other, share_E, load_N, least);
        }
      }
    }
  }

  // Load of all experts of a rank or of one, and of those without another replica.
  struct Load {
    double all = 0, fixed = 0;
    void add(const Load& other, double sign) {
      all += sign * other.all;
      fixed += sign * other.fixed;
    }
  };

  // By how much squares fall if `more` goes from one rank to another.
  static double gained(double more, double from, double to) {
    return 2 * more * (from - to - more);
  }

  // The best exchange between two ranks, if it gains enough.
  bool exchange(int one, int other, const std::vector<Load>& share_E, std::vector<Load>& load_N,
                double least) {
    const Load& from = load_N[one];
    const Load& to = load_N[other];
    double best = least;
    int best_at = -1, best_to = -1;
    Load best_more;
    for (int at = 0; at < shape_.capacity; ++at) {
      for (int its = 0; its < shape_.capacity; ++its) {
        Load more = share_E[slot(one, at)];
        more.add(share_E[slot(other, its)], -1);
        const double gain = gained(more.all, from.all, to.all) +
                            gained(more.fixed, from.fixed, to.fixed);
        if (gain <= best || !can_swap(one, at, other, its)) continue;
        best = gain, best_at = at, best_to = its, best_more = more;
      }
    }
    if (best_at < 0) return false;
    load_N[one].add(best_more, -1);
    load_N[other].add(best_more, 1);
    std::swap(slot(one, best_at), slot(other, best_to));
    return true;
  }

  bool can_swap(int one, int at, int other, int to) {
    return (at < shape_.home) == (to < shape_.home) && !has(one, slot(other, to)) &&
           !has(other, slot(one, at));
  }

  void set(int rank, int at, int expert) {
    const int node = rank / shape_.node_size, old = slot(rank, at);
    slot(rank, at) = static_cast<int16_t>(expert);
    if (held(node, expert)++ == 0) crossings_.move(expert, Crossings::kNowhere, node);
    if (--held(node, old) == 0) crossings_.move(old, node, Crossings::kNowhere);
  }

  void repair(int tries) {
    double excess = mean_excess(std::numeric_limits<double>::infinity());
    double score = crossings_.rows() + kExcessRows * excess;
    for (int i = 0; i < tries && excess > 0; ++i) {
      const int one = random_.below(shape_.ranks), at = random_.below(shape_.capacity);
      int other = random_.below(shape_.ranks);
      const int to = random_.below(shape_.capacity);
      // Half of the tries inside a node, where no row depends on it.
      const int size = shape_.node_size;
      if (random_.below(2)) other = one / size * size + other % size;
      const int expert = slot(one, at);
      int swapped = -1, came;
      if (random_.below(2)) {
        if (!can_swap(one, at, other, to)) continue;
        came = swapped = slot(other, to);
      } else {
        came = random_.below(shape_.experts);
        if (at < shape_.home || is_last(expert) || has(one, came)) continue;
      }
      auto turn = [&](int here, int there) {
        if (swapped >= 0 && one / size == other / size) {
          std::swap(slot(one, at), slot(other, to));
          return;
        }
        if (swapped >= 0) set(other, to, there);
        set(one, at, here);
      };
      turn(came, expert);
      const double rows = crossings_.rows();
      const double after = rows < score ? mean_excess((score - rows) / kExcessRows) : excess;
      if (rows + kExcessRows * after < score) {
        excess = after, score = rows + kExcessRows * after;
      } else {
        turn(expert, came);
      }
    }
  }

  bool is_last(int expert) {
    int replicas = 0;
    for (int node = 0; node < shape_.nodes(); ++node) replicas += held(node, expert);
    return replicas == 1;
  }

  // The mean of the largest rank load above the mean load, as its share; or at least `most`.
  double mean_excess(double most) {
    const auto loads = static_cast<double>(loads_XE_.size());
    FlowGraph graph = graph_of_slots();
    double sum = 0;
    for (const auto& load_E : loads_XE_) {
      sum += std::max(excess(graph, load_E) - kFreeExcess, 0.0);
      if (sum / loads >= most) break;
    }
    return sum / loads;
  }

  FlowGraph graph_of_slots() const {
    const Replicas replicas(shape_, slots_S_.data());
    FlowGraph graph;
    graph.ranks = shape_.ranks;
    for (int e = 0; e < shape_.experts; ++e) {
      graph.group_begin.push_back(e);
      graph.pair_begin.push_back(replicas.begin_E[e]);
    }
    for (int s : replicas.slot) graph.pair_rank.push_back(s / shape_.capacity);
    graph.own.assign(shape_.experts, 0);
    graph.supply.assign(shape_.experts, 0);
    graph.index();
    return graph;
  }

  double excess(FlowGraph& graph, const std::vector<int64_t>& load_E) const {
    graph.supply = load_E;
    const int64_t total = std::accumulate(load_E.begin(), load_E.end(), int64_t{0});
    int64_t cap = (total + shape_.ranks - 1) / shape_.ranks;
    for (int e = 0; e < shape_.experts; ++e) {
      const int64_t replicas = graph.pair_begin[e + 1] - graph.pair_begin[e];
      cap = std::max(cap, (load_E[e] + replicas - 1) / replicas);
    }
    std::vector<int64_t> flow(graph.pairs(), 0), room_N(shape_.ranks, cap);
    for (int e = 0; e < shape_.experts; ++e) {
      int64_t left = load_E[e];
      for (int pair = graph.pair_begin[e]; pair < graph.pair_begin[e + 1]; ++pair) {
        flow[pair] = std::min(left, room_N[graph.pair_rank[pair]]);
        room_N[graph.pair_rank[pair]] -= flow[pair];
        left -= flow[pair];
      }
    }
    const int64_t largest = minimise_largest_load(graph, cap, flow);
    return static_cast<double>(largest) * shape_.ranks / static_cast<double>(total) - 1;
  }

  const Shape& shape_;
  const Pairs& pairs_;
  const std::vector<std::vector<int64_t>>& loads_XE_;
  Random& random_;
  Crossings& crossings_;
  std::vector<int16_t> slots_S_;
  std::vector<int> used_N_;
  std::vector<double> load_N_;
  std::vector<int> held_QE_;
};

}  // namespace

std::vector<int16_t> choose_ranks(const Shape& shape, const Pairs& pairs,
                                  const NodeExperts& experts,
                                  const std::vector<std::vector<int64_t>>& loads_XE, int tries,
                                  Random& random, Crossings& crossings) {
  return Ranks(shape, pairs, loads_XE, random, crossings).run(experts, tries);
}

}  // namespace laer
