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
// A step uses a slot and takes O(H + G + log N), and shifts the list of givers. Only where
// no expert of the most loaded givers fills the room are all of them compared.
//
// Source: A. J. Walker, An Efficient Method for Generating Discrete Random Variables with General
// Distributions, ACM Transactions on Mathematical Software 3(3), 1977.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node, H = E/N
// home slots.
#include "home.hpp"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
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
  AliasMethod(const Shape& shape, const Sums& sums, int64_t level)
      : shape_(shape), node_counts_QE_(sums.node_counts_QE), level_(level),
        tokens_E_(sums.loads_E), order_E_(shape.experts), load_N_(shape.ranks, 0),
        used_N_(shape.ranks, 0) {
    layout_.slots_S = at_home(shape);
    layout_.loads_S.assign(shape.slots(), 0);
    std::iota(order_E_.begin(), order_E_.end(), 0);
    for (int rank = 0; rank < shape.ranks; ++rank) {
      const auto first = order_E_.begin() + rank * shape.home;
      std::sort(first, first + shape.home, [&](int a, int b) { return is_less(a, b); });
      for (int i = 0; i < shape.home; ++i) load_N_[rank] += tokens_E_[rank * shape.home + i];
      if (load_N_[rank] > level_) givers_.push_back({-load_N_[rank], rank});
      else enter(rank);
    }
    std::sort(givers_.begin(), givers_.end(), std::greater<>());
  }

  HomeLayout run() {
    while (!givers_.empty() && !takers_.empty()) {
      const int taker = takers_.top().second;
      const int64_t room = level_ - load_N_[taker];
      int place = shape_.nodes() > 1 ? place_for_locality(taker, room) : kNowhere;
      if (place == kNowhere) place = largest_place(choose_giver(taker, room));
      const int giver = place / shape_.home;
      takers_.pop();
      givers_.erase(place_of(giver));
      move(place, taker, room);
      enter(taker);
      enter(giver);
    }
    for (int e = 0; e < shape_.experts; ++e) {
      layout_.loads_S[e / shape_.home * shape_.capacity + e % shape_.home] = tokens_E_[e];
    }
    layout_.replicas = std::accumulate(used_N_.begin(), used_N_.end(), 0);
    layout_.largest = *std::max_element(load_N_.begin(), load_N_.end());
    return std::move(layout_);
  }

 private:
  using Loaded = std::pair<int64_t, int>;  // a load and its rank

  bool is_less(int a, int b) const {
    return tokens_E_[a] != tokens_E_[b] ? tokens_E_[a] < tokens_E_[b] : a > b;
  }

  // The place, in the order, of the expert of a rank with most tokens at home.
  int largest_place(int rank) const { return (rank + 1) * shape_.home - 1; }
  int64_t most_of(int rank) const { return tokens_E_[order_E_[largest_place(rank)]]; }

  // The place of a giver in their list, or the one where it belongs.
  std::vector<Loaded>::iterator place_of(int rank) {
    return std::lower_bound(givers_.begin(), givers_.end(), Loaded{-load_N_[rank], rank},
                            std::greater<>());
  }

  void enter(int rank) {
    if (load_N_[rank] > level_) {
      givers_.insert(place_of(rank), {-load_N_[rank], rank});
    } else if (load_N_[rank] < level_ && used_N_[rank] < shape_.capacity - shape_.home) {
      takers_.push({load_N_[rank], rank});
    }
  }

  int choose_giver(int taker, int64_t room) const {
    const auto first = load_N_.begin() + taker / shape_.node_size * shape_.node_size;
    const int in_node = std::max_element(first, first + shape_.node_size) - load_N_.begin();
    for (int giver : {in_node, givers_.back().second}) {
      if (load_N_[giver] > level_ && most_of(giver) >= room) return giver;
    }
    const auto has_less = [&](const Loaded& a, const Loaded& b) {
      const int64_t more = most_of(b.second) - most_of(a.second);
      return more != 0 ? more > 0 : a.second > b.second;
    };
    return std::max_element(givers_.begin(), givers_.end(), has_less)->second;
  }

  // The place of the expert that keeps most tokens of the taker's node there, or none.
  int place_for_locality(int taker, int64_t room) const {
    const int node = taker / shape_.node_size;
    const int64_t* counts_E = node_counts_QE_.data() + static_cast<int64_t>(node) * shape_.experts;
    int best = kNowhere;
    int64_t most = 0;
    const auto end = givers_.rbegin() + std::min<size_t>(kCompared, givers_.size());
    for (auto giver = givers_.rbegin(); giver != end; ++giver) {
      if (giver->second / shape_.node_size == node) continue;
      const int first = giver->second * shape_.home;
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
    add_replica(taker, expert, given);
    tokens_E_[expert] -= given;
    load_N_[giver] -= given;
    load_N_[taker] += given;
    for (; at != first && is_less(*at, *(at - 1)); --at) std::swap(*at, *(at - 1));
  }

  void add_replica(int taker, int expert, int64_t tokens) {
    const int first = taker * shape_.capacity + shape_.home;
    int slot = first + used_N_[taker]++;
    for (; slot > first && layout_.slots_S[slot - 1] > expert; --slot) {
      layout_.slots_S[slot] = layout_.slots_S[slot - 1];
      layout_.loads_S[slot] = layout_.loads_S[slot - 1];
    }
    layout_.slots_S[slot] = static_cast<int16_t>(expert);
    layout_.loads_S[slot] = tokens;
  }

  static constexpr int kNowhere = -1;

  const Shape& shape_;
  const std::vector<int64_t>& node_counts_QE_;
  const int64_t level_;
  std::vector<int64_t> tokens_E_;  // that are still at home
  std::vector<int> order_E_;       // experts of each rank, ascending by these
  std::vector<int64_t> load_N_;
  std::vector<int> used_N_;     // replica slots
  std::vector<Loaded> givers_;  // by negative loads, descending: the last one gives first
  std::priority_queue<Loaded, std::vector<Loaded>, std::greater<>> takers_;
  HomeLayout layout_;
};

}  // namespace

std::vector<int16_t> at_home(const Shape& shape) {
  std::vector<int16_t> slots_S(shape.slots(), kEmpty);
  for (int e = 0; e < shape.experts; ++e) {
    slots_S[e / shape.home * shape.capacity + e % shape.home] = static_cast<int16_t>(e);
  }
  return slots_S;
}

HomeLayout stock_placement(const Shape& shape, const Sums& sums) {
  HomeLayout stock{at_home(shape), std::vector<int64_t>(shape.slots(), 0)};
  for (int rank = 0; rank < shape.ranks; ++rank) {
    const auto first = sums.loads_E.begin() + rank * shape.home, last = first + shape.home;
    std::copy(first, last, stock.loads_S.begin() + rank * shape.capacity);
    stock.largest = std::max(stock.largest, std::accumulate(first, last, int64_t{0}));
  }
  stock.is_ideal = stock.largest <= ideal_load(shape, sums);
  return stock;
}

int64_t ideal_load(const Shape& shape, const Sums& sums) {
  const int64_t total =
      std::accumulate(sums.loads_E.begin(), sums.loads_E.end(), int64_t{0});
  return (total + shape.ranks - 1) / shape.ranks;
}

HomeLayout replicate(const Shape& shape, const Sums& sums, int64_t level) {
  const int64_t ideal = ideal_load(shape, sums);
  HomeLayout made = AliasMethod(shape, sums, std::max(level, ideal)).run();
  made.is_ideal = made.largest <= ideal;
  return made;
}

void fill_slots(const Shape& shape, const Sums& sums, int most, Fill fill,
                std::vector<int16_t>& slots_S) {
  const int experts = shape.experts;
  const std::vector<int64_t>& loads_E = sums.loads_E;
  std::vector<int64_t> holders_E(experts, 0), spread_E(experts, 0), load_N(shape.ranks, 0);
  std::vector<char> lacks_QE(static_cast<size_t>(shape.nodes()) * experts, 1);
  const auto hold = [&](int rank, int expert) {
    ++holders_E[expert];
    if (fill == Fill::kLoadAndNode) spread_E[expert] = loads_E[expert] * kParts / holders_E[expert];
    lacks_QE[static_cast<int64_t>(rank / shape.node_size) * experts + expert] = 0;
  };
  for (int slot = 0; slot < shape.slots(); ++slot) {
    if (slots_S[slot] != kEmpty) hold(slot / shape.capacity, slots_S[slot]);
  }
  for (int e = 0; e < experts; ++e) load_N[e / shape.home] += loads_E[e];
  std::vector<int> order(shape.ranks), by_spread_E(experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return load_N[a] < load_N[b]; });
  const auto spreads_more = [&](int a, int b) { return spread_E[a] > spread_E[b]; };
  std::iota(by_spread_E.begin(), by_spread_E.end(), 0);
  std::sort(by_spread_E.begin(), by_spread_E.end(), spreads_more);
  // The node's tokens for any one expert are not more.
  std::vector<int64_t> bound_Q(shape.nodes());
  for (int node = 0; node < shape.nodes(); ++node) {
    const int64_t* counts_E = sums.node_counts_QE.data() + static_cast<int64_t>(node) * experts;
    bound_Q[node] = *std::max_element(counts_E, counts_E + experts) * kParts;
  }
  for (int place = shape.home; place < shape.home + most; ++place) {
    for (int rank : order) {
      const auto first = slots_S.begin() + rank * shape.capacity, last = first + place;
      if (*last != kEmpty) continue;
      const int node = rank / shape.node_size;
      const int64_t* counts_E = sums.node_counts_QE.data() + static_cast<int64_t>(node) * experts;
      const char* lacks_E = lacks_QE.data() + static_cast<int64_t>(node) * experts;
      int best = kEmpty;
      auto best_at = by_spread_E.begin();
      int64_t most_tokens = fill == Fill::kLoadAndNode ? -1 : 0;
      for (auto at = by_spread_E.begin(); at != by_spread_E.end(); ++at) {
        const int e = *at;
        if (spread_E[e] + bound_Q[node] < most_tokens) break;
        const int64_t tokens = counts_E[e] * lacks_E[e] * kParts + spread_E[e];
        if (tokens < most_tokens || (tokens == most_tokens && e > best)) continue;
        if (std::find(first, last, e) != last) continue;
        most_tokens = tokens;
        best = e;
        best_at = at;
      }
      if (best == kEmpty) continue;
      *last = static_cast<int16_t>(best);
      hold(rank, best);
      std::rotate(best_at, best_at + 1,
                  std::lower_bound(best_at + 1, by_spread_E.end(), best, spreads_more));
      std::sort(first + shape.home, last + 1);
    }
  }
}

}  // namespace laer
