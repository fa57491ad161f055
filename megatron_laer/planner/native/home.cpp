// Walker's alias method for experts with a home.
//
// Home. Each rank holds its H = E/N home experts whole. A *taker* is a rank below the level with a
// free replica slot, a *giver* is a rank above it. A step moves tokens of one home expert of a giver
// to a replica on a taker: as many as the taker has room for, even if the giver falls below the
// level, for the giver is then a taker itself.
//
// Lemma. A giver was never a taker, so all its replica slots are free and all its tokens are those
// of home experts. For a taker only fills up to the level, and only giving changes a load downwards.
// Hence no replica is at home, and no rank has two of one expert: a step either fills the taker up
// or leaves no token of the expert at home.
//
// Theorem. With N = E and one replica slot per rank, the largest load is at most the level, for any
// level of at least total / N; so it is the ideal, ceil(total / N), with that as the level.
//
// Proof. Call a rank open until its replica slot is used. All tokens above the level are on open
// ranks. A giver's one expert has more tokens than the level, hence more than any room: each step
// fills its taker up to the level exactly and closes it. So n open ranks have at most n * level
// tokens; if one has more than the level, another has fewer and is a taker. With no open rank left,
// none is above the level.
//
// With H > 1 a giver's largest expert may be smaller than the room: the taker is then left short, and
// the level can be missed (four experts of half a mean on one of two ranks need two replicas on the
// other). More replica slots help, as a taker goes on with the next expert. The theorem holds then
// too, wherever every room finds an expert that fills it.
//
// Phases of replicate():
//   1. Loads of experts and ranks, and each rank's experts sorted.
//   2. Steps, the most underloaded taker first. It takes the largest expert of the most loaded giver
//      of its node, or of all, if that fills its room; else the largest of all givers. With several
//      nodes, an expert of another node that fills the room and that most tokens of the taker's node
//      are for goes first: these tokens then stay in their node. Every layout here is at least as
//      balanced as stock's placement, since a step only lowers loads that are above the level.
//   3. Experts of a rank's replica slots ascend, empty slots come last.
// A step takes O(H + log N) and uses a slot, so all take O(N * (C - H) * (H + log N)) besides
// sorting.
//
// Source: A. J. Walker, An Efficient Method for Generating Discrete Random Variables with General
// Distributions, ACM Transactions on Mathematical Software 3(3), 1977.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node, H = E/N
// home slots.
#include "home.hpp"

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>

#include "quotas.hpp"

namespace laer {
namespace {

// Givers by load whose experts are looked at for tokens of a taker's node.
constexpr int kCompared = 8;

// Parts of a token in which tokens per holder are counted.
constexpr int64_t kParts = 1024;

class AliasMethod {
 public:
  AliasMethod(const Shape& shape, const int64_t* node_counts_QE,
              const std::vector<int64_t>& loads_E, int64_t level)
      : shape_(shape), node_counts_QE_(node_counts_QE), level_(level),
        tokens_E_(loads_E), order_E_(loads_E.size()),
        load_N_(shape.ranks, 0), givers_Q_(shape.nodes()), replicas_N_(shape.ranks) {
    std::iota(order_E_.begin(), order_E_.end(), 0);
    for (int rank = 0; rank < shape.ranks; ++rank) {
      const auto first = order_E_.begin() + rank * shape.home;
      std::sort(first, first + shape.home, [&](int a, int b) { return is_less(a, b); });
      for (int i = 0; i < shape.home; ++i) load_N_[rank] += tokens_E_[rank * shape.home + i];
      enter(rank);
    }
  }

  HomeLayout run() {
    while (!givers_.empty() && !takers_.empty()) {
      const int taker = takers_.begin()->second;
      const int64_t room = level_ - load_N_[taker];
      int place = shape_.nodes() > 1 ? place_for_locality(taker, room) : kNowhere;
      if (place == kNowhere) place = largest_place(choose_giver(taker, room));
      const int giver = place / shape_.home;
      leave(taker);
      leave(giver);
      move(place, taker, room);
      enter(taker);
      enter(giver);
    }
    HomeLayout layout;
    layout.slots_S = at_home(shape_);
    layout.loads_S.assign(shape_.slots(), 0);
    for (int rank = 0; rank < shape_.ranks; ++rank) {
      const int first = rank * shape_.capacity;
      for (int slot = first; slot < first + shape_.home; ++slot) {
        layout.loads_S[slot] = tokens_E_[layout.slots_S[slot]];
      }
      std::sort(replicas_N_[rank].begin(), replicas_N_[rank].end());
      int slot = first + shape_.home;
      for (const auto& [expert, tokens] : replicas_N_[rank]) {
        layout.slots_S[slot] = static_cast<int16_t>(expert);
        layout.loads_S[slot++] = tokens;
      }
      layout.replicas += static_cast<int>(replicas_N_[rank].size());
      layout.largest = std::max(layout.largest, load_N_[rank]);
    }
    return layout;
  }

 private:
  using ByLoad = std::set<std::pair<int64_t, int>>;

  bool is_less(int a, int b) const {
    return tokens_E_[a] != tokens_E_[b] ? tokens_E_[a] < tokens_E_[b] : a > b;
  }

  // The place, in the order, of the expert of a rank with most tokens at home.
  int largest_place(int rank) const { return (rank + 1) * shape_.home - 1; }
  int64_t most_of(int rank) const { return tokens_E_[order_E_[largest_place(rank)]]; }

  // Sets of givers are in descending order, those of takers ascending.
  void enter(int rank) {
    if (load_N_[rank] > level_) {
      givers_Q_[rank / shape_.node_size].insert({-load_N_[rank], rank});
      givers_.insert({-load_N_[rank], rank});
      by_largest_.insert({-most_of(rank), rank});
    } else if (load_N_[rank] < level_ &&
               static_cast<int>(replicas_N_[rank].size()) < shape_.capacity - shape_.home) {
      takers_.insert({load_N_[rank], rank});
    }
  }

  void leave(int rank) {
    if (load_N_[rank] > level_) {
      givers_Q_[rank / shape_.node_size].erase({-load_N_[rank], rank});
      givers_.erase({-load_N_[rank], rank});
      by_largest_.erase({-most_of(rank), rank});
    } else {
      takers_.erase({load_N_[rank], rank});
    }
  }

  int choose_giver(int taker, int64_t room) const {
    for (const ByLoad* givers : {&givers_Q_[taker / shape_.node_size], &givers_}) {
      if (givers->empty()) continue;
      const int most_loaded = givers->begin()->second;
      if (most_of(most_loaded) >= room) return most_loaded;
    }
    return by_largest_.begin()->second;
  }

  // The place of the expert that keeps most tokens of the taker's node there, or none.
  int place_for_locality(int taker, int64_t room) const {
    const int node = taker / shape_.node_size;
    const int64_t* counts_E = node_counts_QE_ + static_cast<int64_t>(node) * shape_.experts;
    int best = kNowhere, compared = 0;
    int64_t most = 0;
    for (const auto& giver : givers_) {
      if (compared++ == kCompared) break;
      const int first = giver.second * shape_.home;
      if (giver.second / shape_.node_size == node) continue;
      for (int place = first + shape_.home - 1; place >= first; --place) {
        const int expert = order_E_[place];
        if (tokens_E_[expert] < room) break;
        if (std::min(room, counts_E[expert]) <= most) continue;
        most = std::min(room, counts_E[expert]);
        best = place;
      }
    }
    return best;
  }

  void move(int place, int taker, int64_t room) {
    const int giver = place / shape_.home;
    const auto first = order_E_.begin() + giver * shape_.home;
    auto at = order_E_.begin() + place;
    const int expert = *at;
    const int64_t given = std::min(room, tokens_E_[expert]);
    replicas_N_[taker].push_back({expert, given});
    tokens_E_[expert] -= given;
    load_N_[giver] -= given;
    load_N_[taker] += given;
    for (; at != first && is_less(*at, *(at - 1)); --at) std::swap(*at, *(at - 1));
  }

  static constexpr int kNowhere = -1;

  const Shape& shape_;
  const int64_t* node_counts_QE_;
  const int64_t level_;
  std::vector<int64_t> tokens_E_;  // that are still at home
  std::vector<int> order_E_;       // experts of each rank, ascending by these
  std::vector<int64_t> load_N_;
  std::vector<ByLoad> givers_Q_;
  ByLoad givers_, by_largest_, takers_;
  std::vector<std::vector<std::pair<int, int64_t>>> replicas_N_;  // experts and tokens
};

int64_t ideal_of(const Shape& shape, const std::vector<int64_t>& loads_E) {
  const int64_t total = std::accumulate(loads_E.begin(), loads_E.end(), int64_t{0});
  return (total + shape.ranks - 1) / shape.ranks;
}

}  // namespace

std::vector<int16_t> at_home(const Shape& shape) {
  std::vector<int16_t> slots_S(shape.slots(), kEmpty);
  for (int e = 0; e < shape.experts; ++e) {
    slots_S[e / shape.home * shape.capacity + e % shape.home] = static_cast<int16_t>(e);
  }
  return slots_S;
}

HomeLayout stock_placement(const Shape& shape, const int64_t* node_counts_QE) {
  const std::vector<int64_t> loads_E = expert_loads(shape, node_counts_QE);
  HomeLayout stock{at_home(shape), std::vector<int64_t>(shape.slots(), 0)};
  for (int rank = 0; rank < shape.ranks; ++rank) {
    const auto first = loads_E.begin() + rank * shape.home, last = first + shape.home;
    std::copy(first, last, stock.loads_S.begin() + rank * shape.capacity);
    stock.largest = std::max(stock.largest, std::accumulate(first, last, int64_t{0}));
  }
  stock.is_ideal = stock.largest <= ideal_of(shape, loads_E);
  return stock;
}

int64_t ideal_load(const Shape& shape, const int64_t* node_counts_QE) {
  return ideal_of(shape, expert_loads(shape, node_counts_QE));
}

HomeLayout replicate(const Shape& shape, const int64_t* node_counts_QE, int64_t level) {
  const std::vector<int64_t> loads_E = expert_loads(shape, node_counts_QE);
  const int64_t ideal = ideal_of(shape, loads_E);
  level = std::max(level, ideal);
  HomeLayout made = AliasMethod(shape, node_counts_QE, loads_E, level).run();
  made.is_ideal = made.largest <= ideal;
  return made;
}

void fill_slots(const Shape& shape, const int64_t* node_counts_QE, int most, Fill fill,
                std::vector<int16_t>& slots_S) {
  const int experts = shape.experts;
  const std::vector<int64_t> loads_E = expert_loads(shape, node_counts_QE);
  std::vector<int64_t> holders_E(experts, 0), spread_E(experts, 0), load_N(shape.ranks, 0);
  std::vector<int64_t> missed_QE(node_counts_QE, node_counts_QE + shape.nodes() * experts);
  const auto hold = [&](int rank, int expert) {
    ++holders_E[expert];
    if (fill == Fill::kLoadAndNode) spread_E[expert] = loads_E[expert] * kParts / holders_E[expert];
    missed_QE[rank / shape.node_size * experts + expert] = 0;
  };
  for (int slot = 0; slot < shape.slots(); ++slot) {
    if (slots_S[slot] != kEmpty) hold(slot / shape.capacity, slots_S[slot]);
  }
  for (int e = 0; e < experts; ++e) load_N[e / shape.home] += loads_E[e];
  std::vector<int> order(shape.ranks);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return load_N[a] < load_N[b]; });
  for (int place = shape.home; place < shape.home + most; ++place) {
    for (int rank : order) {
      const auto first = slots_S.begin() + rank * shape.capacity, last = first + place;
      if (*last != kEmpty) continue;
      const int64_t* missed_E = missed_QE.data() + rank / shape.node_size * experts;
      int best = kEmpty;
      int64_t most_tokens = fill == Fill::kLoadAndNode ? -1 : 0;
      for (int e = 0; e < experts; ++e) {
        const int64_t tokens = missed_E[e] * kParts + spread_E[e];
        if (tokens <= most_tokens || std::find(first, last, e) != last) continue;
        most_tokens = tokens;
        best = e;
      }
      if (best == kEmpty) continue;
      *last = static_cast<int16_t>(best);
      hold(rank, best);
      std::sort(first + shape.home, last + 1);
    }
  }
}

}  // namespace laer
